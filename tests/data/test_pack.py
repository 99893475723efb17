"""``pra data pack``: its shards from every source, resuming, refusals."""

import hashlib
import json
import os
import pickle
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.data import config, imagenet, shard, write_idx, write_parquet
from support.files import contents
from support.refusal import refused

from pra import cli
from pra.config import OnSmall
from pra.data import open_source, prepare
from pra.data import pack as pack_module
from pra.data.emoji import FONT, GROUPS
from pra.data.pack import Packing, pack
from pra.data.source import Part
from pra.data.survey import check
from pra.utils.locks import locked


def pixels(source, index):
    return np.asarray(source.image(index).convert("RGBA"))


def test_packed_images_come_back(photos, tmp_path):
    source = open_source(photos)
    done = pack(source, tmp_path / "new" / "packed", Packing(shard_images=3), workers=2)
    files = sorted(path.name for path in (tmp_path / "new/packed").iterdir())
    assert files == ["classes.json", "index.json", *(f"shard-00000{n}.tar" for n in range(3))]
    assert (done.images, done.shards, done.skipped) == (7, 3, 0)
    packed = open_source(f"wds:{tmp_path}/new/packed")
    assert packed.classes == source.classes
    assert packed.labels.tolist() == source.labels.tolist()
    assert all((pixels(packed, i) == pixels(source, i)).all() for i in range(7))
    assert (source.image(1).size, packed.image(1).size) == ((20, 30), (20, 30))  # upright
    names = [packed.where(i).split()[0] for i in range(7)]
    assert names == [f"0000000{i}.{kind}" for i, kind in enumerate(["jpg", "png", "webp", "png", "jpg", "png", "png"])]
    assert packed.encoded(0) == (tmp_path / "photos/cat/0.jpg").read_bytes()
    with tarfile.open(tmp_path / "new/packed/shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.mode) for m in tar.getmembers()} == {(0, 0, 0o644)}  # the same each time


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_packing_size_and_format_are_kept(photos, tmp_path, kind):
    pack(open_source(photos), tmp_path / "packed", Packing(size=30, format=kind, quality=90, shard_images=4), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    sizes = [(45, 30), (20, 30), (30, 30), (25, 20), (30, 38), (30, 33), (38, 30)]
    assert [packed.image(i).size for i in range(7)] == sizes
    assert {packed.where(i).split()[0].split(".")[1] for i in range(7)} == {kind}
    assert packed.image(6).mode == ("RGB" if kind == "jpg" else "RGBA")
    assert packed.image(4).mode == ("RGB" if kind == "webp" else "L")
    index = json.loads((tmp_path / "packed/index.json").read_text())
    assert json.loads((tmp_path / "packed/classes.json").read_text()) == ["cat", "dog", "emu"]
    assert (index["made_from"]["source"], index["made_from"]["size"]) == (photos, 30)
    for record, count in zip(index["shardlist"], (4, 3), strict=True):
        data = (tmp_path / "packed" / record["url"]).read_bytes()
        assert record["nsamples"] == count
        assert (record["filesize"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_packed_centre_crop_equals_the_image(photos, tmp_path):
    """Bitwise if the format is lossless: training on packed images is training on the data."""
    source = open_source(photos)
    pack(source, tmp_path / "packed", Packing(size=16, format="png"), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    how = config(on_small=OnSmall.UPSCALE)
    for index in range(6):  # the last is transparent: scaled before it is put on white
        expected = prepare(source.image(index), (16, 16), 3, how, None, "")
        assert (prepare(packed.image(index), (16, 16), 3, how, None, "") == expected).all()


def test_packing_interrupted_resumes(photos, tmp_path):
    source, folder, partial = open_source(photos), tmp_path / "packed", tmp_path / ".packed.partial"
    bad = tmp_path / "photos/dog/4.jpg"
    good = bad.read_bytes()
    bad.write_bytes(good[:100])
    refused(lambda: pack(source, folder, Packing(shard_images=2), 0), "--skip-corrupt", code="unreadable", where=bad)
    assert not folder.exists()
    whole = {path.name: path.stat().st_ino for path in partial.glob("*.tar")}
    assert len(whole) == 2
    bad.write_bytes(good)
    said = str(partial), "shard_images: 2 there, 3 asked for"
    refused(lambda: pack(source, folder, Packing(shard_images=3), 0), *said)
    pack(source, folder, Packing(shard_images=2), 1)
    assert not partial.exists()
    assert all((folder / name).stat().st_ino == inode for name, inode in whole.items())
    pack(source, tmp_path / "again", Packing(shard_images=2), 0)
    assert contents(folder) == contents(tmp_path / "again")
    refused(lambda: pack(source, folder, Packing(shard_images=2), 0), str(folder), "exists")


def test_packing_killed_at_its_end_is_tidied(photos, tmp_path, monkeypatch):
    source, folder = open_source(photos), tmp_path / "packed"
    packed = pack(source, tmp_path / "again", Packing(), 0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        pack(source, folder, Packing(), 0)
    assert (folder / "plan.json").exists()
    refused(lambda: pack(source, folder, Packing(size=9), 0), code="exists")
    assert (folder / "plan.json").exists()
    assert pack(source, folder, Packing(), 0) == packed
    refused(lambda: pack(source, folder, Packing(), 0), code="exists")
    assert contents(folder) == contents(tmp_path / "again")


def test_packing_folder_in_use_is_refused(photos, tmp_path):
    source, partial = open_source(photos), tmp_path / ".packed.partial"
    with locked(partial, "filled", "wait"):
        refused(lambda: pack(source, tmp_path / "packed", Packing(), 0), str(partial))
        assert [path.name for path in partial.iterdir()] == [".lock"]
    pack(source, tmp_path / "packed", Packing(), 0)
    assert not (tmp_path / "packed" / ".lock").exists()


def test_packing_worker_killed_is_refused(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "encode", killed)
    refused(lambda: pack(open_source(photos), tmp_path / "packed", Packing(), 1), "--workers", "memory", code="lost")
    assert not (tmp_path / "packed").exists()


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_packing_leaves_corrupt_images_out(photos, tmp_path):
    (tmp_path / "photos/cat/1.png").write_bytes(b"")
    refused(lambda: pack(open_source(photos), tmp_path / "packed", Packing(), 0), "--skip-corrupt")
    done = pack(open_source(photos), tmp_path / "packed", Packing(skip_corrupt=True), 0)  # resumes
    assert (done.images, done.skipped) == (6, 1)
    assert open_source(f"wds:{tmp_path}/packed").labels.tolist() == [0, 0, 1, 1, 1, 2]
    [problem] = json.loads((tmp_path / "packed/index.json").read_text())["skipped"]
    assert problem.startswith(f"{tmp_path}/photos/cat/1.png: not an image")
    for path in (tmp_path / "photos").rglob("*.*"):
        path.write_bytes(b"")
    none = Packing(skip_corrupt=True)
    refused(lambda: pack(open_source(photos), tmp_path / "none", none, 0), "7 images", code="unreadable", name=photos)


def test_packing_full_disk_is_refused(photos, tmp_path, full_disk):
    with full_disk(4096):
        refused(lambda: pack(open_source(photos), tmp_path / "packed", Packing(), 0), "shard-000000.tar", "too large")
    assert [path.name for path in (tmp_path / ".packed.partial").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "kind",
    [
        *("digits@test", "idx:DIR/idx", "imagenet-tar:DIR/train.tar", "emoji@test", "wds:DIR/s.tar"),
        *("hf:DIR/x.parquet", "hf:DIR/x.parquet?streaming=true&window=2"),
    ],
)
def test_packing_reads_every_source(kind, tmp_path, request):
    if kind == "emoji@test" and not (FONT.is_file() and GROUPS.is_file()):
        pytest.skip("Noto's colour emoji (fonts-noto-color-emoji, unicode-data) are absent")
    write_idx(tmp_path / "idx")
    (tmp_path / "train.tar").write_bytes(imagenet())
    (tmp_path / "s.tar").write_bytes(shard(1, 0, classes=2))
    if kind.startswith("hf"):
        animals = request.getfixturevalue("hub").ClassLabel(names=["cat", "dog"])
        write_parquet(tmp_path / "x.parquet", range(5), label=(animals, lambda i: i % 2))
    source = pickle.loads(pickle.dumps(open_source(kind.replace("DIR", str(tmp_path)))))  # as workers get it
    if len(source) > 9:
        source = Part(source, np.arange(9))
    report = check(source, None, workers=0)
    assert report["corrupt"] == []
    assert sum(size["images"] for size in report["sizes"]) == len(source)
    assert sum(one["images"] for one in report["classes"]) == len(source)
    pack(source, tmp_path / "packed", Packing(shard_images=100), workers=0)
    packed = open_source(f"wds:{tmp_path}/packed")
    assert packed.labels.tolist() == source.labels.tolist()
    assert packed.classes == source.classes
    assert all((pixels(packed, index) == pixels(source, index)).all() for index in range(0, len(source), 3))


def test_data_commands_pack_and_check(photos, tmp_path, capsys):
    packed, report = str(tmp_path / "packed"), tmp_path / "report.json"
    assert cli.main(("data", "pack", photos, packed, "--size", "20", "--format", "png", "--workers", "1")) == 0
    out = capsys.readouterr().out
    assert f"packed 7 images: 1 shard, 0.000 GB, in {packed}" in out
    assert f"next: pra train RECIPE --data wds:{packed}" in out
    words = ["data", "check", f"wds:{packed}", "--size", "21", "--out", str(report), "--workers", "0"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "corrupt: 0" in out
    assert "smaller than 21x21: 7" in out
    assert json.loads(report.read_text())["images"] == 7
    for line, part in (
        (words, f"{report} exists"),
        (["data", "check", "digits", "--size", "0"], "--size must"),
        (["data", "check", "digits", "--workers", "-1"], "--workers must lie in [0, 1024], got -1"),
        (["data", "pack", "digits", "/"], "/ exists already"),
        (["data", "pack", "digits", "new", "--quality", "101"], "quality must lie in [1, 100], got 101"),
        (["data", "pack", "digits", "new", "--size", "0"], "size must lie in [1, 1e+06], got 0"),
        (["data", "pack", "digits", "new", "--shard-images", "0"], "shard_images must lie in [1, 1e+09], got 0"),
        (["data", "pack", "digits", "new", "--format", "gif"], "format gif is unknown. Use jpg, png, webp"),
    ):
        assert cli.main(line) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert part in err.splitlines()[-1]
