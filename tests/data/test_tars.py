"""ImageNet's tar, WebDataset shards on disk, and the index of both."""

import gzip
import json
import os
import pickle
import tarfile
from contextlib import nullcontext
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from support.data import imagenet, jpeg, same_batches, same_jpeg, shard, tar_of
from support.refusal import refused

from pra.data import open_source, tars
from pra.data.images import warn_once


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


def test_imagenet_tar_class_twice_is_refused(tar):
    one = tar_of({"a.JPEG": jpeg()})
    tar.write_bytes(tar_of({"train/n01.tar": one, "val/n01.tar": one}))
    parts = "two classes 'n01'", "train/n01.tar and val/n01.tar"
    refused(lambda: open_source(f"imagenet-tar:{tar}"), *parts, code="conflict", path=tar)


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


POISON = {
    "labels": [
        np.array([9, 0, 0]),
        np.array([-1, 0, 0]),
        np.array([[0, 0, 0]]),
        np.array([0.5, 0, 0]),
        np.array([0, 1]),
    ],
    "files": [np.array([1, 0, 0]), np.array([-1, 0, 0])],
    "offsets": [np.array([-512, 0, 0]), np.array([2**62, 0, 0])],
    "sizes": [np.array([2**62, 1, 1]), np.array([-1, 1, 1])],
    "members": [np.array(["a", "b", "c"]), np.array([None] * 3), np.zeros(10**7, "S1")],
    "classes": [np.array([1, 2]), np.array("n01"), np.array([], "U1")],
    "all": [np.empty(0)],
}


@pytest.mark.parametrize(("name", "array"), [(name, array) for name, arrays in POISON.items() for array in arrays])
def test_poisoned_tar_index_is_made_again(tar, name, array, capfd):
    open_source(f"imagenet-tar:{tar}")
    index = Path(f"{tar}.index.npz")
    with np.load(index) as saved:
        columns = {column: values[:0] for column, values in saved.items()} if name == "all" else {name: array}
        np.savez_compressed(index, **dict(saved) | columns | {"stamp": saved["stamp"]})
    capfd.readouterr()
    source = open_source(f"imagenet-tar:{tar}")
    assert "indexing" in capfd.readouterr().err
    assert (source.labels.tolist(), source.classes) == ([1, 1, 0], ("n01", "n02"))
    source.image(0)


def test_tar_index_that_is_a_pipe_does_not_hang(tar):
    os.mkfifo(f"{tar}.index.npz")
    assert len(open_source(f"imagenet-tar:{tar}")) == 3


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_classes_that_are_not_a_file_are_refused(tmp_path, make):
    (tmp_path / "a.tar").write_bytes(shard())
    make(tmp_path / "classes.json")
    do = lambda: open_source(f"wds:{tmp_path}")  # noqa: E731
    refused(do, "not a regular file", code="unreadable", path=tmp_path / "classes.json")


def left_out(folder, files):
    """The warnings about a shard."""
    if not (folder / "s.tar").exists():
        (folder / "s.tar").write_bytes(tar_of(files))
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="left out") as warned:
        source = open_source(f"wds:{folder}/s.tar")
    return [source.where(i).split()[0] for i in range(len(source))], [str(one.message) for one in warned]


def test_wds_names_with_dots_are_counted_and_named(tmp_path):
    files = {"v1.0/a.jpg": jpeg(), "v1.0/a.cls": b"0", "v1.0/a.seg.png": b""}  # a mask is a part of its sample
    for name in ("b.1", "b.2", "a.v2"):
        files |= {f"v1.0/{name}.png": b"", f"v1.0/{name}.cls": b"1"}
    for _ in range(2):  # first by a scan, then from the index
        found, [text] = left_out(tmp_path, files)
        assert found == ["v1.0/a.jpg"]
        assert "3 left out, such as v1.0/b.1.png in" in text
        assert "first dot" in text
    assert len(open_source(f"wds:{tmp_path}/s.tar")) == 1  # and warned about once
    (tmp_path / "s.tar").write_bytes(tar_of({"a.b.jpg": jpeg(), "a.b.cls": b"0"}))
    refused(lambda: open_source(f"wds:{tmp_path}"), "1 left out, such as a.b.jpg", "first dot", code="missing")


def test_wds_samples_without_a_picture_are_counted(tmp_path):
    files = {"a.jpg": jpeg(), "a.cls": b"0", "notes.txt": b"", "._a.jpg": b""}
    key = "b" * 3000
    files |= {f"{key}.jp2": b"?", f"{key}.cls": b"1", "c.cls": b"1", "c.json": b"{}"}
    found, [text] = left_out(tmp_path, files)
    assert found == ["a.jpg"]
    assert f"2 left out, such as {'b' * 200} ... in {tmp_path}" in text


def test_wds_lost_shards_of_a_packing_are_named(shards):
    for index, lost in (({"shardlist": [{"url": f"a-{i}.tar"} for i in range(5)]}, True), (["?"], False)):
        (shards / "index.json").write_text(json.dumps(index))
        with pytest.warns(UserWarning, match="2 shards .* such as a-3.tar") if lost else nullcontext():
            assert len(open_source(f"wds:{shards}")) == 7
    assert len(open_source(f"wds:{shards}/a-0.tar")) == 3  # as asked for


def test_wds_links_are_counted(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        (tmp_path / "a.jpg").write_bytes(jpeg())
        (tmp_path / "b.jpg").hardlink_to(tmp_path / "a.jpg")
        for name in ("a.jpg", "b.jpg"):
            tar.add(tmp_path / name, name)
    with pytest.warns(UserWarning, match="1 left out, such as b.jpg .* link.*--hard-dereference"):
        assert len(open_source(f"wds:{tmp_path}")) == 1
