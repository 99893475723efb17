"""The files of MNIST and Fashion-MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from support.data import write_idx
from support.refusal import refused

from pra.data import open_source

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("packed", [False, True])
def test_idx_reads_both_splits(tmp_path, packed):
    folder = write_idx(write_idx(tmp_path / "mnist"), count=4, split="t10k")
    for path in list(folder.iterdir()) if packed else []:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    source = open_source(f"idx:{folder}")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.labels.dtype == np.int64
    assert source.classes == ("0", "1", "2")
    assert source.image(5).size == (6, 4)
    assert (np.asarray(source.image(5)) == 5).all()
    assert len(open_source(f"idx:{folder}@test")) == 4


def test_idx_fashion_folder_names_classes(tmp_path, monkeypatch):
    folder = write_idx(tmp_path / "Fashion-MNIST")
    assert open_source(f"idx:{folder}").classes[:2] == ("t-shirt", "trouser")
    monkeypatch.chdir(folder)
    assert open_source("idx:.").classes[9] == "ankle boot"


def header(count):
    return struct.pack(">4B3I", 0, 0, 8, 3, count, 4, 6)


def test_idx_damaged_file_is_refused(tmp_path):
    images = write_idx(tmp_path / "d") / "train-images-idx3-ubyte"
    packed = images.with_suffix(".gz")
    for content, part in (
        (header(7) + bytes(167), "promises 168 bytes and 167 follow"),
        (header(7) + bytes(169), "168 bytes and more follow"),
        (header(7)[:9], "not an IDX file"),
        (b"\x89PNG" + header(7)[4:] + bytes(168), "'89504e47', not with '00000803'"),
        (header(0), "promises 0 bytes"),
    ):
        images.write_bytes(content)
        refused(lambda: open_source(f"idx:{tmp_path}/d"), part, code="unreadable", path=images)
        images.unlink()
        for damaged in (gzip.compress(content)[:-12], b"x" + gzip.compress(content), gzip.compress(content)[:20]):
            packed.write_bytes(damaged)
            refused(lambda: open_source(f"idx:{tmp_path}/d"), "damaged", code="unreadable", path=packed)
    for promised, part in ((7, "168 bytes and more follow"), (2**31, f"promises {24 * 2**31} bytes, the most is")):
        packed.write_bytes(gzip.compress(header(promised) + bytes(2**24)))
        refused(lambda: open_source(f"idx:{tmp_path}/d"), part, code="unreadable", path=packed)


def test_idx_missing_or_unlike_files_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    refused(lambda: open_source(f"idx:{folder}"), code="missing", path=folder)
    folder.mkdir()
    refused(lambda: open_source(f"idx:{folder}"), "train-images-idx3-ubyte.gz", code="missing", path=folder)
    images = write_idx(folder) / "train-images-idx3-ubyte"
    images.write_bytes(header(6) + bytes(144))
    refused(lambda: open_source(f"idx:{folder}"), "6 images", "7 labels", code="mismatch", path=images)

    def denied(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    refused(lambda: open_source(f"idx:{folder}"), "Permission denied", code="unreadable", path=images)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST (Debian's dataset-fashion-mnist) is absent")
def test_idx_real_fashion_mnist_is_read():
    source = open_source(f"idx:{FASHION}@test")
    assert len(source) == 10_000
    assert source.classes[int(source.labels[0])] == "ankle boot"
    assert source.image(0).size == (28, 28)
