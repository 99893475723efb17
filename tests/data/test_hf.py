"""Hugging Face data sets from local files, whole and streamed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data import jpeg, picture, same_jpeg, write_parquet
from support.refusal import refused

from pra.data import open_source
from pra.data.images import CorruptImage

STREAM = "&streaming=true&window=4"


@pytest.fixture(scope="module")
def rows(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 11 rows of several columns, the image ``i`` that of seed ``i``. To be read only."""
    path = tmp_path_factory.mktemp("rows")
    animals, pair = hub.ClassLabel(names=["cat", "dog", "emu"]), hub.ClassLabel(names=["a", "b"])
    labels = {
        "animal": (animals, lambda i: i % 3),
        "number": (hub.Value("int32"), lambda i: i % 4),
        "name": (hub.Value("string"), lambda i: "yx"[i % 2]),
        "some": (pair, lambda i: -1),
        "id": (hub.Value("int64"), lambda i: 10**15 if i == 1 else i),
    }
    write_parquet(path / "train.parquet", range(11), **labels)
    return path


@pytest.mark.parametrize("stream", ["", STREAM])
@pytest.mark.parametrize("file", ["", "/train.parquet"])
def test_hf_rows_are_read_in_any_order(rows: Path, file: str, stream: str) -> None:
    source = open_source(f"hf:{rows}{file}?label=animal{stream}")
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.tolist() == [i % 3 for i in range(11)]
    assert source.labels.dtype == np.int64
    assert all(same_jpeg(source.image(index), index) for index in (10, 0, 5, 4, 9))
    assert source.where(4) == f"row 4 of {source.name}"


@pytest.mark.parametrize("stream", ["", STREAM])
@pytest.mark.parametrize(
    ("label", "classes", "labels"),
    [("number", "0123", [0, 1, 2, 3]), ("name", "xy", [1, 0, 1, 0]), ("none", ["image"], [0] * 4)],
)
def test_hf_labels_of_any_kind(rows: Path, label: str, classes: Any, labels: list[int], stream: str) -> None:
    source = open_source(f"hf:{rows}?label={label}{stream}")
    assert (source.classes, source.labels[:4].tolist(), len(source)) == (tuple(classes), labels, 11)


@pytest.mark.parametrize("stream", ["", STREAM])
def test_hf_arrow_file_is_read(hub: Any, rows: Path, tmp_path: Path, stream: str) -> None:
    hub.Dataset.from_parquet(str(rows / "train.parquet")).save_to_disk(tmp_path)
    [file] = tmp_path.glob("*.arrow")
    source = open_source(f"hf:{file}?label=animal{stream}")
    assert source.labels.tolist() == [i % 3 for i in range(11)]
    assert same_jpeg(source.image(9), 9)


@pytest.mark.usefixtures("hub")
def test_hf_folder_of_images_names_classes(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(name)).save(path)
    for stream in ("?streaming=true", ""):
        source = open_source(f"hf:{tmp_path}/animals{stream}")
        assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
        assert (np.asarray(source.image(2)) == np.asarray(picture(seed=9))).all()
    path.unlink()
    refused(lambda: source.image(2), f"{path}: No such file", code="unreadable", where=source.where(2))


@pytest.mark.usefixtures("cache")
def test_stream_labels_are_kept_while_files_stay(rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def read_again() -> bool:
        open_source(f"hf:{rows}?label=animal{STREAM}")
        return "reading labels" in capfd.readouterr().err

    assert read_again()
    assert not read_again()
    status = (rows / "train.parquet").stat()
    os.utime(rows / "train.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert read_again()


def test_hf_corrupt_images_are_named(hub: Any, tmp_path: Path) -> None:
    images = [{"bytes": jpeg(0)[:200], "path": None}, None]
    kinds = hub.Features({"image": hub.Image()})
    hub.Dataset.from_dict({"image": images}, features=kinds).to_parquet(str(tmp_path / "x.parquet"))
    for stream in ("", "&streaming=true"):
        source = open_source(f"hf:{tmp_path}/x.parquet?label=none{stream}")
        for index, problem in enumerate(("cannot be decoded", "has no image")):
            where = source.where(index)
            refused(lambda i=index: source.image(i), problem, code="unreadable", where=where)  # noqa: B023
            with pytest.raises(CorruptImage):
                source.image(index)


@pytest.mark.parametrize(
    ("query", "code", "parts"),
    [
        ("", "invalid", ["label=COLUMN", "label=none", "animal, id, image, name, number, some"]),
        ("?label=animla", "unknown", ["'animla'", "did you mean 'animal'?"]),
        ("?image=img", "unknown", ["'img'"]),
        ("?image=name&label=none", "invalid", ["'name' holds Value"]),
        ("?image=none&label=none", "invalid", ["'none'"]),
        ("?label=image", "invalid", ["'image' holds no classes"]),
        ("?label=some", "invalid", ["row 0 has class -1", "label=none"]),
        ("?label=id", "invalid", ["row 1: class 1000000000000000", "label=none"]),
        ("?label=animal&split=test", "unreadable", ["test"]),
        ("?config=big&label=animal", "unreadable", ["'big' not found"]),
        ("?lable=label", None, ["lable", "did you mean 'label'?"]),
        *((f"?{key}=", "invalid", [f"{key}= lacks its value"]) for key in ("label", "revision", "split", "window")),
        ("?path=cifar10", "unknown", ["no setting 'path'"]),
        ("?streaming=yes", None, ["streaming", "'yes'"]),
        ("?streaming=true&window=0", None, ["window", "[1, 1e+06]"]),
        ("?streaming=true&label=some", "invalid", ["row 0 has class -1"]),
        ("@test", "invalid", ["?split=test"]),
    ],
)
def test_hf_bad_settings_are_refused(rows: Path, query: str, code: str | None, parts: list[str]) -> None:
    refused(lambda: open_source(f"hf:{rows}{query}"), *parts, code=code)


@pytest.mark.usefixtures("hub")
def test_hf_bad_paths_are_refused(rows: Path, tmp_path: Path) -> None:
    refused(lambda: open_source("hf:"), code="missing", name="hf:")
    refused(lambda: open_source(f"hf:{tmp_path}/none"), code="missing", path=tmp_path / "none")
    (tmp_path / "a.txt").write_text("")
    refused(lambda: open_source(f"hf:{tmp_path}/a.txt"), ".parquet", code="missing", path=tmp_path / "a.txt")
    (tmp_path / "train.parquet").write_bytes((rows / "train.parquet").read_bytes()[:1000])
    for stream in ("", STREAM):
        name = f"hf:{tmp_path}/train.parquet?label=animal{stream}"
        refused(lambda name=name: open_source(name), code="unreadable", name=name)
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("state.json", "dataset_dict.json"):
        (saved / name).write_text("{}")
        refused(lambda: open_source(f"hf:{saved}"), "save_to_disk", "to_parquet", code="unreadable", path=saved)
        (saved / name).unlink()


def test_stream_that_breaks_off_is_refused(rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.parquet"
    data.write_bytes((rows / "train.parquet").read_bytes())
    source = open_source(f"hf:{data}?label=animal{STREAM}")
    write_parquet(data, range(6))
    assert same_jpeg(source.image(5), 5)
    refused(lambda: source.image(6), "Start again", row=6)
    data.unlink()
    refused(lambda: pickle.loads(pickle.dumps(source)).image(0), code="unreadable", name=source.name)
