"""ImageNet's tar, and the index of tars."""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from support.data import imagenet, jpeg, same_batches, same_jpeg, shard, tar_of
from support.refusal import refused

from pra.data import open_source, tars


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "train.tar"
    path.write_bytes(imagenet())
    return path


def test_imagenet_tar_is_read_in_place(tar: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_source(f"imagenet-tar:{tar}")
    assert "indexing train.tar" in capfd.readouterr().err
    assert source.classes == ("n01", "n02")
    assert source.labels.tolist() == [1, 1, 0]
    assert source.labels.dtype == np.int64
    assert source.where(2) == f"n01/n01_5.JPEG in {tar}"
    assert all(same_jpeg(source.image(i), seed) for i, seed in enumerate((3, 4, 5)))


def test_tar_source_is_shared_with_other_processes(tar: Path) -> None:
    source = open_source(f"imagenet-tar:{tar}")
    source.image(0)  # opens the file
    same_batches(source, pickle.loads(pickle.dumps(source)), start=4, stop=12)
    same_batches(source, source, start=4, stop=12, workers=2)


def test_tar_index_is_reused_until_the_tar_changes(tar: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def indexed_again() -> bool:
        capfd.readouterr()
        source = open_source(f"imagenet-tar:{tar}")
        assert (source.labels.tolist(), source.classes) == ([1, 1, 0], ("n01", "n02"))
        source.image(2)
        return "indexing" in capfd.readouterr().err

    index = Path(f"{tar}.index.npz")
    assert indexed_again()
    assert not indexed_again()
    assert sorted(p.name for p in tar.parent.iterdir()) == ["train.tar", "train.tar.index.npz"]
    status = tar.stat()
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert indexed_again()
    tar.write_bytes(tar.read_bytes() + bytes(512))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert indexed_again()
    for damaged in (index.read_bytes()[:-100], pickle.dumps("not to be trusted")):
        index.write_bytes(damaged)
        assert indexed_again()
        assert not indexed_again()


def test_tar_index_not_beside_the_tar_is_cached(
    tar: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(f"{tar}.index.npz").mkdir()  # binds root as well, unlike permissions
    open_source(f"imagenet-tar:{tar}")
    [index] = cache.iterdir()
    assert index.name.startswith("train.tar.")
    capfd.readouterr()
    monkeypatch.chdir(tar.parent)
    open_source("imagenet-tar:train.tar")
    assert "indexing" not in capfd.readouterr().err
    index.unlink()
    index.parent.rmdir()
    index.parent.write_text("in the way")
    with pytest.warns(UserWarning, match=str(cache)):
        source = open_source(f"imagenet-tar:{tar}")
    assert same_jpeg(source.image(0), 3)


def test_imagenet_tar_bad_input_is_refused(tar: Path) -> None:
    """Python's tarfile takes a cut between classes, and a broken header, for the end of the archive."""
    spec, whole = f"imagenet-tar:{tar}", tar.read_bytes()
    for path in (Path(f"{tar}x"), tar.parent):
        refused(lambda path=path: open_source(f"imagenet-tar:{path}"), code="missing", path=path)
    with tarfile.open(tar) as outer:
        last = outer.getmembers()[-1]
    start, inner, size = last.offset, last.offset_data, last.size
    for data, part, path in (
        *((data, "uncompressed tar", tar) for data in (b"", b"text" * 1000, gzip.compress(whole))),
        *((whole[: int((inner + size) * share)], "uncompressed tar", None) for share in (0.2, 0.5, 0.9)),
        (tar_of({"a/b.jpg": jpeg()}), "no class tars", tar),
        (tar_of({"n01.tar": tar_of({"notes.txt": b""})}), "no class tars", tar),
        (tar_of({"n01.tar": b"text" * 1000}), "uncompressed tar", f"n01.tar in {tar}"),
        (whole[:start], f"at byte {start}", tar),
        (whole[:start] + b"x" * 512 + whole[start + 512 :], f"at byte {start}", tar),
        (whole[: inner + 100] + b"x" * 9 + whole[inner + 109 :], "", f"n01.tar in {tar}"),
    ):
        tar.write_bytes(data)
        fields = {"path": path} if path else {}
        refused(lambda: open_source(spec), part, code="unreadable", **fields)
    assert not Path(f"{tar}.index.npz").exists()


def test_tar_source_corrupt_or_lost_image_is_named(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes().replace(jpeg(4), jpeg(4)[:99] + bytes(len(jpeg(4)) - 99)))
    source = open_source(f"imagenet-tar:{tar}")
    refused(lambda: source.image(1), "data.on_corrupt=skip", code="unreadable", where=f"n02/n02_4.JPEG in {tar}")
    elsewhere = pickle.loads(pickle.dumps(source))  # where no file is open yet
    tar.rename(f"{tar}.gone")
    refused(lambda: elsewhere.image(0), "No such file", code="unreadable", where=f"n02/n02_3.JPEG in {tar}")


def test_tar_source_closes_the_least_recently_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "OPEN_FILES", 2)
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(shard(number))
    source, opened, before = open_source(f"wds:{tmp_path}"), list[str](), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(tars, "FileIO", lambda path: opened.append(path.stem) or FileIO(path))
    assert all(same_jpeg(source.image(index), index) for index in (0, 1, 0, 2, 0, 1))
    assert opened == ["0", "1", "2", "1"]
    assert len(os.listdir("/proc/self/fd")) == before + 2
