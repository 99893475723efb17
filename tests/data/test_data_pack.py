"""``pra data pack`` and ``pra data check``: what they write and find, from every source, and what they refuse."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.files import contents
from support.refusal import refused
from test_data import config, imagenet, jpeg, picture, tar_of, write_idx

from pra import cli
from pra.config import OnSmall
from pra.data import Source, open_source, prepare
from pra.data import pack as pack_module
from pra.data.check import check
from pra.data.emoji import FONT, GROUPS
from pra.data.pack import Packing, pack
from pra.utils.locks import locked


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """Seven pictures of three classes in several formats and modes."""
    pictures = {
        "cat/0.jpg": picture(40, 60, 0),
        "cat/1.png": picture(30, 20, 1),
        "cat/2.webp": picture(33, 33, 2),
        "dog/3.bmp": picture(20, 25, 3),
        "dog/4.jpg": picture(50, 40, 4, "L"),
        "dog/5.png": picture(41, 37, 5, "P"),
        "emu/6.png": picture(64, 80, 6, "RGBA"),
    }
    for name, image in pictures.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.mode == "RGBA":
            image.putalpha(100)
        image.save(path)
    return f"folder:{tmp_path}/photos"


def pixels(source: Source, index: int) -> Any:
    return np.asarray(source.image(index).convert("RGBA"))


# --- pack ---------------------------------------------------------------------------------------------------


def test_what_is_packed_comes_back(photos: str, tmp_path: Path) -> None:
    source = open_source(photos)
    done = pack(source, tmp_path / "new" / "packed", Packing(shard_images=3), workers=2)
    files = sorted(path.name for path in (tmp_path / "new/packed").iterdir())
    assert files == ["classes.json", "index.json", *(f"shard-00000{n}.tar" for n in range(3))]
    assert (done.images, done.shards, done.skipped) == (7, 3, 0)
    packed = open_source(f"wds:{tmp_path}/new/packed")
    assert packed.classes == source.classes
    assert packed.labels.tolist() == source.labels.tolist()
    assert all((pixels(packed, i) == pixels(source, i)).all() for i in range(7))
    names = [packed.where(i).split()[0] for i in range(7)]
    assert names == [f"0000000{i}.{kind}" for i, kind in enumerate(["jpg", "png", "webp", "png", "jpg", "png", "png"])]
    assert packed.encoded(0) == (tmp_path / "photos/cat/0.jpg").read_bytes()


def test_the_index_of_a_packing(photos: str, tmp_path: Path) -> None:
    pack(open_source(photos), tmp_path / "packed", Packing(shard_images=4, size=16), workers=0)
    index = json.loads((tmp_path / "packed/index.json").read_text())
    assert json.loads((tmp_path / "packed/classes.json").read_text()) == ["cat", "dog", "emu"]
    assert index["made_from"]["source"] == photos
    assert index["made_from"]["size"] == 16
    for record, count in zip(index["shardlist"], (4, 3), strict=True):
        data = (tmp_path / "packed" / record["url"]).read_bytes()
        assert record["nsamples"] == count
        assert (record["filesize"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_sizes_and_formats(photos: str, tmp_path: Path, kind: str) -> None:
    source = open_source(photos)
    pack(source, tmp_path / "packed", Packing(size=30, format=kind, quality=90), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    sizes = [(45, 30), (20, 30), (30, 30), (25, 20), (30, 38), (30, 33), (38, 30)]
    assert [packed.image(i).size for i in range(7)] == sizes
    assert {packed.where(i).split()[0].split(".")[1] for i in range(7)} == {kind}
    assert packed.image(6).mode == ("RGB" if kind == "jpg" else "RGBA")
    assert packed.image(4).mode == ("RGB" if kind == "webp" else "L")


def test_the_centre_crop_of_a_packed_image_is_that_of_the_image(photos: str, tmp_path: Path) -> None:
    """To the bit where the format loses nothing: training on what was packed is training on the data."""
    source = open_source(photos)
    pack(source, tmp_path / "packed", Packing(size=16, format="png"), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    how = config(on_small=OnSmall.UPSCALE)
    for index in range(6):  # the last is transparent: scaled before it is laid on white
        expected = prepare(source.image(index), (16, 16), 3, how, None, "")
        assert (prepare(packed.image(index), (16, 16), 3, how, None, "") == expected).all()


def test_pictures_that_lie_on_their_side(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "p").mkdir()
    picture(12, 10).save(tmp_path / "p/a.png", exif=exif)
    source = open_source(f"folder:{tmp_path}/p")
    pack(source, tmp_path / "packed", Packing(), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    assert packed.image(0).size == (12, 10)
    assert (pixels(packed, 0) == pixels(source, 0)).all()


def test_an_interrupted_packing_goes_on(photos: str, tmp_path: Path) -> None:
    source, folder, partial = open_source(photos), tmp_path / "packed", tmp_path / ".packed.partial"
    bad = tmp_path / "photos/dog/4.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    refused(lambda: pack(source, folder, Packing(shard_images=2), 0), str(bad), "cannot be decoded", "--skip-corrupt")
    assert not folder.exists()
    whole = {path.name: path.stat().st_ino for path in partial.glob("*.tar")}
    assert len(whole) == 2
    bad.write_bytes(good)
    refused(lambda: pack(source, folder, Packing(shard_images=3), 0), str(partial), "shard_images 2, not 3", "remove")
    pack(source, folder, Packing(shard_images=2), 1)
    assert not partial.exists()
    assert all((folder / name).stat().st_ino == inode for name, inode in whole.items())
    pack(source, tmp_path / "again", Packing(shard_images=2), 0)
    assert contents(folder) == contents(tmp_path / "again")
    refused(lambda: pack(source, folder, Packing(shard_images=2), 0), f"{folder} exists already")


def test_two_commands_do_not_pack_into_one_folder(photos: str, tmp_path: Path) -> None:
    source, partial = open_source(photos), tmp_path / ".packed.partial"
    with locked(partial, "filled", "wait"):
        refused(lambda: pack(source, tmp_path / "packed", Packing(), 0), f"{partial} is being filled by", "folder")
        assert [path.name for path in partial.iterdir()] == [".lock"]
    pack(source, tmp_path / "packed", Packing(), 0)
    assert not (tmp_path / "packed" / ".lock").exists()


def test_a_worker_that_is_killed_while_packing(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module._Encoder, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    refused(lambda: pack(open_source(photos), tmp_path / "packed", Packing(), 1), "has died", "--workers", "memory")
    assert not (tmp_path / "packed").exists()


def test_corrupt_images_left_out(photos: str, tmp_path: Path) -> None:
    (tmp_path / "photos/cat/1.png").write_bytes(b"")
    done = pack(open_source(photos), tmp_path / "packed", Packing(skip_corrupt=True), 0)
    assert (done.images, done.skipped) == (6, 1)
    assert open_source(f"wds:{tmp_path}/packed").labels.tolist() == [0, 0, 1, 1, 1, 2]
    [problem] = json.loads((tmp_path / "packed/index.json").read_text())["skipped"]
    assert problem.startswith(f"{tmp_path}/photos/cat/1.png: not an image")
    for path in (tmp_path / "photos").rglob("*.*"):
        path.write_bytes(b"")
    refused(lambda: pack(open_source(photos), tmp_path / "none", Packing(skip_corrupt=True), 0), "none of the 7 images")


def test_packing_on_a_full_disk(photos: str, tmp_path: Path, full_disk: Callable[[int], Any]) -> None:
    with full_disk(4096):
        refused(lambda: pack(open_source(photos), tmp_path / "packed", Packing(), 0), "shard-000000.tar", "too large")
    assert [path.name for path in (tmp_path / ".packed.partial").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"size": 0}, "--size 0 must be at least 1"),
        ({"format": "gif"}, "--format 'gif' is none of jpg, png, webp"),
        ({"quality": 101}, "--quality 101"),
        ({"shard_images": 0}, "--shard-images 0"),
    ],
)
def test_packings_that_will_not_do(settings: dict[str, Any], part: str) -> None:
    refused(lambda: Packing(**settings), part)


# --- every source -------------------------------------------------------------------------------------------


def _parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra 'hf'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    columns = {"image": [{"bytes": jpeg(i), "path": None} for i in range(5)], "label": [0, 1, 0, 1, 0]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(str(folder / "x.parquet"))
    return f"hf:{folder}/x.parquet"


def _spec(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if kind.startswith("hf"):
        return _parquet(folder, monkeypatch) + kind[2:]
    if kind == "digits@test":
        pytest.importorskip("sklearn", reason="scikit-learn is in the extra 'train'")
        return kind
    if kind == "emoji@test":
        pytest.importorskip("fontTools", reason="fontTools is in the extra 'emoji'")
        if not (FONT.is_file() and GROUPS.is_file()):
            pytest.skip("Noto's colour emoji (fonts-noto-color-emoji, unicode-data) are absent")
        return kind
    if kind == "idx":
        return f"idx:{write_idx(folder / 'idx')}"
    if kind == "imagenet-tar":
        (folder / "train.tar").write_bytes(imagenet())
        return f"imagenet-tar:{folder}/train.tar"
    (folder / "s.tar").write_bytes(tar_of({"a.jpg": jpeg(0), "a.cls": b"1", "b.jpg": jpeg(1), "b.cls": b"0"}))
    return f"wds:{folder}/s.tar"


@pytest.mark.parametrize(
    "kind", ["digits@test", "idx", "imagenet-tar", "emoji@test", "wds", "hf", "hf?streaming=true&window=2"]
)
def test_every_source(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(_spec(kind, tmp_path, monkeypatch))
    findings = check(source, None, workers=0)
    assert findings.corrupt == []
    assert sum(findings.sizes.values()) == sum(findings.class_counts) == len(source)
    pack(source, tmp_path / "packed", Packing(shard_images=100), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    assert packed.labels.tolist() == source.labels.tolist()
    assert packed.classes == source.classes
    for index in range(0, len(source), 7):
        assert (pixels(packed, index) == pixels(source, index)).all()


# --- check --------------------------------------------------------------------------------------------------


def test_findings(photos: str, tmp_path: Path) -> None:
    (tmp_path / "photos/cat/1.png").write_bytes(b"")
    whole = (tmp_path / "photos/dog/4.jpg").read_bytes()
    (tmp_path / "photos/dog/4.jpg").write_bytes(whole[: len(whole) // 2])
    report = check(open_source(photos), 34, workers=2).report()
    assert report["images"] == 7
    assert [(found["index"], found["where"]) for found in report["corrupt"]] == [
        (1, f"{tmp_path}/photos/cat/1.png"),
        (4, f"{tmp_path}/photos/dog/4.jpg"),
    ]
    assert "not an image" in report["corrupt"][0]["problem"]
    assert report["classes"] == [{"name": n, "images": i} for n, i in (("cat", 3), ("dog", 3), ("emu", 1))]
    assert report["modes"] == {"RGB": 3, "P": 1, "RGBA": 1}
    assert {"width": 60, "height": 40, "images": 1} in report["sizes"]
    assert report["smallest"] == {"where": f"{tmp_path}/photos/dog/3.bmp", "width": 25, "height": 20}
    assert report["largest"] == {"where": f"{tmp_path}/photos/emu/6.png", "width": 80, "height": 64}
    assert [found["width"] for found in report["smaller_than_size"]] == [33, 25]


def test_many_classes_are_shown_as_a_histogram(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(60):
        files |= {f"{number}.png": b"", f"{number}.cls": str(min(number, 29)).encode()}
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    lines = check(open_source(f"wds:{tmp_path}/s.tar"), None, workers=0).lines()
    assert lines[0] == "corrupt: 60"
    assert lines[11] == "  ... and 50 more (--out FILE.json has all)"
    assert lines[12].startswith("classes: 30, 1 (0) to 31 (29) images, median 1, most over fewest 31.00")
    assert lines[13].split() == ["1", "to", "4", "images", "#" * 40, "29", "classes"]


# --- the commands -------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err.splitlines()[-1] if err.splitlines() else ""


def test_pack_and_check_as_commands(photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, report = str(tmp_path / "packed"), tmp_path / "report.json"
    code, out, _ = call(capsys, "data", "pack", photos, packed, "--size", "20", "--format", "png", "--workers", "1")
    assert code == 0
    assert f"packed 7 images: 1 shards, 0.000 GB, in {packed}" in out
    assert f"next: pra train RECIPE --data wds:{packed}" in out
    code, out, _ = call(
        capsys, "data", "check", f"wds:{packed}", "--size", "21", "--out", str(report), "--workers", "0"
    )
    assert code == 0
    assert "corrupt: 0" in out
    assert "smaller than 21x21: 7" in out
    assert json.loads(report.read_text())["images"] == 7
    code, _, err = call(capsys, "data", "check", photos, "--out", str(report))
    assert (code, err) == (2, f"pra: error: {report} exists already; choose another --out or remove it")


def test_checking_corrupt_images_fails(photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos/cat/1.png").write_bytes(b"?")
    code, out, err = call(capsys, "data", "check", photos, "--out", str(tmp_path / "report.json"), "--workers", "0")
    assert code == 2
    assert f"  {tmp_path}/photos/cat/1.png: not an image" in out
    assert err.startswith(f"pra: error: 1 of 7 images from {photos} are corrupt. Replace them")
    assert len(json.loads((tmp_path / "report.json").read_text())["corrupt"]) == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data"], "which `pra data`? Known: check, pack"),
        (["data", "pakc"], "no command 'data pakc'; did you mean 'pack'?"),
        (["data", "--sise"], "no command 'data --sise'"),
        (["data", "pack", "digits"], "pra data pack needs DIR"),
        (["data", "check", "digits", "--sise", "3"], "unrecognized options: --sise, 3; perhaps you meant: --size INT"),
        (["data", "check", "digits", "--size", "0"], "--size 0 must be at least 1"),
        (["data", "check", "digits", "--workers", "-1"], "--workers -1 must lie in [0, 1024]"),
        (["data", "check", "digit"], "did you mean 'digits'?"),
        (["data", "pack", "digits", "/"], "/ exists already"),
    ],
)
def test_wrong_command_lines(capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert part in err


def test_members_are_the_same_each_time(photos: str, tmp_path: Path) -> None:
    pack(open_source(photos), tmp_path / "packed", Packing(), 0)
    with tarfile.open(tmp_path / "packed/shard-000000.tar") as tar:
        assert [(m.mtime, m.uid, m.mode) for m in tar.getmembers()] == [(0, 0, 0o644)] * 14
        file = tar.extractfile("00000003.cls")
        assert file is not None
        assert io.BytesIO(file.read()).getvalue() == b"1"
