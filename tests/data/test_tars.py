"""ImageNet's tar, WebDataset shards on disk, and the index of both."""

import gzip
import json
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
def tar(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(imagenet())
    return path


def test_imagenet_tar_is_read_in_place(tar, capfd):
    source = open_source(f"imagenet-tar:{tar}")
    assert "indexing train.tar" in capfd.readouterr().err
    assert source.classes == ("n01", "n02")
    assert source.labels.tolist() == [1, 1, 0]
    assert source.labels.dtype == np.int64
    assert source.where(2) == f"n01/n01_5.JPEG in {tar}"
    assert all(same_jpeg(source.image(i), seed) for i, seed in enumerate((3, 4, 5)))


def test_tar_source_is_shared_with_other_processes(tar):
    source = open_source(f"imagenet-tar:{tar}")
    source.image(0)  # opens the file
    same_batches(source, pickle.loads(pickle.dumps(source)), start=4, stop=12)
    same_batches(source, source, start=4, stop=12, workers=2)


def test_tar_index_is_reused_until_the_tar_changes(tar, capfd):
    def indexed_again():
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


def test_tar_index_not_beside_the_tar_is_cached(tar, cache, monkeypatch, capfd):
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


def test_imagenet_tar_bad_input_is_refused(tar):
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


def test_tar_source_corrupt_or_lost_image_is_named(tar):
    tar.write_bytes(tar.read_bytes().replace(jpeg(4), jpeg(4)[:99] + bytes(len(jpeg(4)) - 99)))
    source = open_source(f"imagenet-tar:{tar}")
    refused(lambda: source.image(1), "data.on_corrupt=skip", code="unreadable", where=f"n02/n02_4.JPEG in {tar}")
    elsewhere = pickle.loads(pickle.dumps(source))  # where no file is open yet
    tar.rename(f"{tar}.gone")
    refused(lambda: elsewhere.image(0), "No such file", code="unreadable", where=f"n02/n02_3.JPEG in {tar}")


def test_tar_source_closes_the_least_recently_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "OPEN_FILES", 2)
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(shard(number))
    source, opened, before = open_source(f"wds:{tmp_path}"), list[str](), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(tars, "FileIO", lambda path: opened.append(path.stem) or FileIO(path))
    assert all(same_jpeg(source.image(index), index) for index in (0, 1, 0, 2, 0, 1))
    assert opened == ["0", "1", "2", "1"]
    assert len(os.listdir("/proc/self/fd")) == before + 2


@pytest.fixture
def shards(tmp_path):
    """Three shards with images 0 to 6."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, images in enumerate(((0, 1, 2), (3, 4), (5, 6))):
        (folder / f"a-{number}.tar").write_bytes(shard(*images))
    return folder


@pytest.mark.parametrize(
    "pattern",
    ["DIR", "DIR/a-{0..2}.tar", "DIR/a-*.tar", "DIR/*", "DIR/{a-0,a-1,a-2}.tar", "DIR/a-[0-9].tar", "./a-*"],
)
def test_wds_patterns_find_the_shards(shards, pattern, monkeypatch, capfd):
    if "{" in pattern:
        pytest.importorskip("braceexpand", reason="braceexpand is in the extra 'wds'")
    monkeypatch.chdir(shards)
    name = f"wds:{pattern.replace('DIR', str(shards))}"
    source = open_source(name)
    assert source.name == name
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.labels.dtype == np.int64
    assert source.classes == ("0", "1", "2")
    assert all(same_jpeg(source.image(index), index) for index in (6, 0, 4, 3, 1))
    assert source.where(4) == f"0004.jpg in {'a-1.tar' if pattern.startswith('.') else shards / 'a-1.tar'}"
    capfd.readouterr()
    assert len(open_source(name)) == 7
    assert "indexing" not in capfd.readouterr().err


def test_wds_names_of_any_length_take_little_memory(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of({f"{10**6 * 'a'}.jpg": jpeg(1)} | {f"{i}.jpg": b"" for i in range(2000)}))
    source = open_source(f"wds:{tmp_path}")
    assert same_jpeg(source.image(0), 1)
    assert source.where(0).startswith("aaa")
    assert len(pickle.dumps(source)) < 10**6


def test_wds_folder_may_be_called_as_a_pattern(tmp_path):
    folder = tmp_path / "a{b}[c]*"
    folder.mkdir()
    (folder / "0.tar").write_bytes(shard(1))
    (folder / "1.tar").symlink_to("/dev/zero")
    for pattern in (folder, folder / "0.tar"):
        assert len(open_source(f"wds:{pattern}")) == 1


def test_wds_index_follows_shards_and_class_names(shards):
    assert open_source(f"wds:{shards}").classes == ("0", "1", "2")
    (shards / "classes.json").write_text(json.dumps(["cat", "dog", "emu", "fox"]))
    assert open_source(f"wds:{shards}").classes == ("cat", "dog", "emu", "fox")
    (shards / "a-1.tar").write_bytes(shard(4))
    assert open_source(f"wds:{shards}").labels.tolist() == [0, 1, 2, 1, 2, 0]
    (shards / "a-3.tar").write_bytes(shard(7))
    assert open_source(f"wds:{shards}").labels.tolist() == [0, 1, 2, 1, 2, 0, 1]


def test_wds_members_may_be_of_other_kinds_or_one_class(tmp_path):
    files = {"x/b.cls": b" 1\n", "x/b.json": b"{}", "x/b.seg.png": b"", "x/b.PNG": b"?", "x/._b.jpg": b""}
    (tmp_path / "s.tar").write_bytes(tar_of(files | {"a.webp": b"?", "a.cls": b"0"}))
    source = open_source(f"wds:{tmp_path}/s.tar")
    assert [source.where(i).split()[0] for i in range(len(source))] == ["x/b.PNG", "a.webp"]
    assert source.labels.tolist() == [1, 0]
    (tmp_path / "s.tar").write_bytes(shard(1, 2, classes=None))
    source = open_source(f"wds:{tmp_path}")
    assert (source.classes, source.labels.tolist()) == (("image",), [0, 0])


def test_wds_bad_patterns_are_refused(shards, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("")
    for path in (shards / "b-*.tar", tmp_path / "other/*.tar", tmp_path / "other/*", shards / "b.tar"):
        pattern = path.parent if path.name == "*.tar" else path
        refused(lambda pattern=pattern: open_source(f"wds:{pattern}"), "KEY.cls", code="missing", path=path)
    pytest.importorskip("braceexpand", reason="braceexpand is in the extra 'wds'")
    refused(lambda: open_source(f"wds:{shards}/a-{{0..3}}.tar"), code="missing", path=shards / "a-3.tar")
    for braces, part in (("{0,0}.tar", f"{shards}/a-0.tar is in it twice"), ("{0..2.tar", "{000..146}")):
        name = f"wds:{shards}/a-{braces}"
        refused(lambda name=name: open_source(name), part, code="invalid", name=name)


def test_wds_bad_shards_are_refused(shards):
    whole, image = shard(3, 4), {"a.jpg": jpeg()}
    bad, inside = shards / "a-1.tar", f"a.jpg in {shards}/a-1.tar"
    for data, code, parts in (
        (whole[: len(whole) // 3], "unreadable", (str(bad), "uncompressed tar")),
        (b"text" * 1000, "unreadable", (str(bad), "uncompressed tar")),
        (tar_of(image), "mismatch", (inside,)),
        (tar_of(image | {"a.cls": b"cat"}), "invalid", ("a.cls", "holds b'cat'")),
        (tar_of(image | {"a.cls": b"-1"}), "invalid", ("a.cls", "holds b'-1'")),
        (tar_of(image | {"a.cls": b"999999999"}), "invalid", (inside, "999999999", "classes.json")),
        (tar_of(image | {"a.png": b""}), "conflict", ("a.jpg and a.png",)),
    ):
        bad.write_bytes(data)
        refused(lambda: open_source(f"wds:{shards}"), *parts, code=code)
    bad.write_bytes(whole)
    for data in (b'["cat", "dog"]', b'{"cat": 0}', b"["):
        (shards / "classes.json").write_bytes(data)
        refused(lambda: open_source(f"wds:{shards}"), "classes.json", code="unreadable")
    (shards / "classes.json").unlink()
    for name in ("a-0.tar", "a-1.tar", "a-2.tar"):
        (shards / name).write_bytes(tar_of({"a.txt": b"", "a.cls": b"1"}))
    refused(lambda: open_source(f"wds:{shards}"), code="missing", path=shards / "a-0.tar")
    assert not list(shards.glob("*.npz"))
