"""Sources at ImageNet's size: WebDataset shards, local and on the web, and Hugging Face data sets."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.refusal import refused
from test_data import config, jpeg, picture, same_jpeg, tar_of

from pra.config import OnCorrupt
from pra.data import Source, TrainingSet, batches, fetch, hf, open_source
from pra.data.images import CorruptImage
from pra.utils.extras import install_command


def sample(number: int, label: int | None) -> dict[str, bytes]:
    files = {f"{number:04d}.jpg": jpeg(number)}
    return files if label is None else files | {f"{number:04d}.cls": str(label).encode()}


def shard(*numbers: int, classes: int | None = 3) -> bytes:
    """Samples whose images are of the seed ``number`` and whose classes go round."""
    files: dict[str, bytes] = {}
    for number in numbers:
        files |= sample(number, None if classes is None else number % classes)
    return tar_of(files)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards with images 0 to 6."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, images in enumerate(((0, 1, 2), (3, 4), (5, 6))):
        (folder / f"a-{number}.tar").write_bytes(shard(*images))
    return folder


def same_batches(one: Source, other: Source, start: int = 0, stop: int = 16, **settings: Any) -> None:
    """The second, begun in the middle, goes on as the first."""
    whole = list(batches(TrainingSet(one, (8, 8), 3, config(flip=True), seed=1), 0, 2, stop))
    rest = batches(TrainingSet(other, (8, 8), 3, config(flip=True, **settings), seed=1), start, 2, stop)
    for expected, found in zip(whole[start // 2 :], rest, strict=True):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(expected, found, strict=True))


# --- wds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "/", "/a-{0..2}.tar", "/a-*.tar", "/*", "/{a-0,a-1,a-2}.tar", "/a-[0-9].tar"])
def test_wds_patterns(shards: Path, pattern: str, capfd: pytest.CaptureFixture[str]) -> None:
    if "{" in pattern:
        pytest.importorskip("braceexpand", reason="braceexpand is in the extra 'wds'")
    source = open_source(f"wds:{shards}{pattern}")
    assert source.name == f"wds:{shards}{pattern}"
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.labels.dtype == np.int64
    assert source.classes == ("0", "1", "2")
    assert all(same_jpeg(source.image(index), index) for index in (6, 0, 4, 3, 1))
    assert source.where(4) == f"0004.jpg in {shards}/a-1.tar"
    capfd.readouterr()
    assert len(open_source(f"wds:{shards}{pattern}")) == 7
    assert "indexing" not in capfd.readouterr().err


def test_wds_one_shard_and_relative_paths(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards)
    for pattern in ("a-1.tar", "./a-1*"):
        source = open_source(f"wds:{pattern}")
        assert source.labels.tolist() == [0, 1]
        assert same_jpeg(source.image(1), 4)


def test_wds_index_follows_the_shards_and_the_names_of_classes(shards: Path) -> None:
    assert open_source(f"wds:{shards}").classes == ("0", "1", "2")
    (shards / "classes.json").write_text(json.dumps(["cat", "dog", "emu", "fox"]))
    assert open_source(f"wds:{shards}").classes == ("cat", "dog", "emu", "fox")
    (shards / "a-1.tar").write_bytes(shard(4))
    assert open_source(f"wds:{shards}").labels.tolist() == [0, 1, 2, 1, 2, 0]
    (shards / "a-3.tar").write_bytes(shard(7))
    assert open_source(f"wds:{shards}").labels.tolist() == [0, 1, 2, 1, 2, 0, 1]


def test_wds_members(tmp_path: Path) -> None:
    """Order, folders, other kinds of files."""
    files = {
        "x/b.cls": b" 1\n",
        "x/b.json": b"{}",
        "x/b.seg.png": b"",
        "x/b.PNG": b"?",
        "x/._b.jpg": b"",
        "a.webp": b"?",
    }
    (tmp_path / "s.tar").write_bytes(tar_of(files | {"a.cls": b"0"}))
    source = open_source(f"wds:{tmp_path}/s.tar")
    assert [source.where(i).split()[0] for i in range(len(source))] == ["x/b.PNG", "a.webp"]
    assert source.labels.tolist() == [1, 0]


def test_wds_without_classes(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(shard(1, 2, classes=None))
    source = open_source(f"wds:{tmp_path}")
    assert source.classes == ("image",)
    assert source.labels.tolist() == [0, 0]


def test_wds_goes_on_in_the_middle_of_an_epoch(shards: Path) -> None:
    source = open_source(f"wds:{shards}")
    source.image(0)
    same_batches(source, pickle.loads(pickle.dumps(source)), start=6)
    same_batches(source, source, start=4, workers=2)


def test_wds_with_more_shards_than_files_may_be_open(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pra.data.tars._OPEN_FILES", 1)
    source = open_source(f"wds:{shards}")
    before = len(os.listdir("/proc/self/fd"))
    for index in (0, 3, 6, 0, 5, 4):
        assert same_jpeg(source.image(index), index)
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_wds_patterns_that_match_nothing(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_text("")
    refused(lambda: open_source("wds:"), "'wds:'", "wds:PATH")
    refused(lambda: open_source(f"wds:{shards}/b-*.tar"), f"{shards}/b-*.tar matches no file", "KEY.cls")
    refused(lambda: open_source(f"wds:{tmp_path}/other"), "matches no file")
    refused(lambda: open_source(f"wds:{tmp_path}/other/*"), "matches 1 files and no .tar", "a.txt")
    refused(lambda: open_source(f"wds:{shards}/b.tar"), f"{shards}/b.tar does not exist")


def test_wds_braces(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("braceexpand", reason="braceexpand is in the extra 'wds'")
    refused(lambda: open_source(f"wds:{shards}/a-{{0..3}}.tar"), f"{shards}/a-3.tar does not exist")
    refused(lambda: open_source(f"wds:{shards}/a-{{0,0}}.tar"), f"{shards}/a-0.tar is in it twice")
    refused(lambda: open_source(f"wds:{shards}/a-{{0..2.tar"), "the braces of", "do not match", "{000..146}")
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    refused(lambda: open_source(f"wds:{shards}/a-{{0..2}}.tar"), "needs braceexpand", install_command("wds"))


def test_wds_shards_that_will_not_do(shards: Path) -> None:
    def refused_with(name: str, data: bytes, *parts: str) -> None:
        before = (shards / name).read_bytes() if (shards / name).exists() else None
        (shards / name).write_bytes(data)
        refused(lambda: open_source(f"wds:{shards}"), *parts)
        (shards / name).unlink() if before is None else (shards / name).write_bytes(before)

    whole = shard(3, 4)
    refused_with("a-1.tar", whole[: len(whole) // 3], f"{shards}/a-1.tar is truncated or damaged at byte", "again")
    refused_with("a-1.tar", b"text" * 1000, f"{shards}/a-1.tar is not an uncompressed tar", "KEY.jpg and KEY.cls")
    unlabelled = tar_of(sample(3, 0) | sample(4, None))
    refused_with("a-1.tar", unlabelled, f"0004.jpg in {shards}/a-1.tar has no class (0004.cls)", "add or remove")
    refused_with("a-1.tar", tar_of({"a.jpg": b"", "a.cls": b"cat"}), f"a.cls in {shards}/a-1.tar holds b'cat'")
    refused_with("a-1.tar", tar_of({"a.jpg": b"", "a.cls": b"-1"}), "holds b'-1'", "0 or more")
    number = tar_of({"a.jpg": b"", "a.cls": b"999999999"})
    refused_with("a-1.tar", number, f"a.jpg in {shards}/a-1.tar has class 999999999", "below 100000", "classes.json")
    refused_with("a-1.tar", tar_of({"a.jpg": b"", "a.png": b""}), "two images of one sample, a.jpg and a.png")
    refused_with("classes.json", b'["cat", "dog"]', "has class 2, but classes.json beside it names 2")
    refused_with("classes.json", b'{"cat": 0}', "classes.json is not a list")
    refused_with("classes.json", b"[", "classes.json is not JSON")
    for name in ("a-0.tar", "a-1.tar", "a-2.tar"):
        (shards / name).write_bytes(tar_of({"a.txt": b"", "a.cls": b"1"}))
    refused(lambda: open_source(f"wds:{shards}"), "a-0.tar holds no images, nor does any other shard")
    assert not list(shards.glob("*.npz"))


def test_wds_corrupt_images(shards: Path) -> None:
    (shards / "a-1.tar").write_bytes(tar_of({"x.jpg": jpeg()[:300], "x.cls": b"0"}))
    source = open_source(f"wds:{shards}")
    refused(lambda: source.image(3), f"x.jpg in {shards}/a-1.tar: cannot be decoded", "data.on_corrupt=skip")
    [batch] = batches(TrainingSet(source, (8, 8), 3, config(on_corrupt=OnCorrupt.SKIP), seed=0), 0, 6, stop=6)
    assert batch.skipped == 1
    (shards / "a-0.tar").unlink()
    elsewhere = pickle.loads(pickle.dumps(source))  # where no file is open yet
    refused(lambda: elsewhere.image(0), "a-0.tar: cannot be read (No such file")


# --- wds on the web -----------------------------------------------------------------------------------------


@dataclass
class Web:
    """A server on this machine: what it has, what it was asked, and how it misbehaves.

    ``faults`` are taken one by one by GET requests for shards: a status to answer, or the bytes after which to hang up
    or to fall silent.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    faults: list[tuple[str, int]] = field(default_factory=list)
    ranges: bool = True
    head: int = 200
    over: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    pytest.importorskip("filelock", reason="filelock is in the extra 'wds'")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    state = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(state.head)

        def do_GET(self) -> None:
            fault, value = state.faults.pop(0) if state.faults and self.path.endswith(".tar") else ("", 0)
            self.answer(value if fault == "status" else 200, value if fault in ("cut", "silence") else None)
            if fault == "silence":
                state.over.wait(10)

        def answer(self, status: int, cut: int | None = None) -> None:
            wanted = self.headers["Range"]
            state.asked.append((self.command, self.path, wanted))
            data = state.files.get(self.path)
            if data is None or status != 200:
                self.send_error(404 if data is None else status)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:] if cut is None else data[start : start + cut])

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def published(web: Web) -> Web:
    web.files = {"/d/a-0.tar": shard(0, 1, 2), "/d/a-1.tar": shard(3, 4), "/d/classes.json": b'["cat", "dog", "emu"]'}
    return web


def gets(web: Web) -> list[tuple[str, str | None]]:
    return [(path, wanted) for command, path, wanted in web.asked if command == "GET" and path.endswith(".tar")]


def test_wds_from_the_web(published: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("braceexpand", reason="braceexpand is in the extra 'wds'")
    spec = f"wds:{published.address}/d/a-{{0..1}}.tar"
    source = open_source(spec)
    assert "fetching" in capfd.readouterr().err
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert same_jpeg(source.image(4), 4)
    assert sorted(gets(published)) == [("/d/a-0.tar", None), ("/d/a-1.tar", None)]
    published.asked.clear()
    published.files.clear()
    assert open_source(spec).classes == ("cat", "dog", "emu")  # from the cache alone
    assert published.asked == []
    [folder] = (tmp_path / "cache/pra/shards").iterdir()
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".npz")}
    assert left == {"a-0.tar", "a-1.tar", "classes.json", ".lock"}


def fetched(web: Web, name: str = "a-0.tar") -> Source:
    return open_source(f"wds:{web.address}/d/{name}")


def test_web_connections_that_break_are_gone_on_with(published: Web) -> None:
    published.faults = [("cut", 1000), ("status", 503), ("cut", 2000)]
    assert same_jpeg(fetched(published).image(2), 2)
    assert gets(published) == [
        ("/d/a-0.tar", None),
        ("/d/a-0.tar", "bytes=1000-"),
        ("/d/a-0.tar", "bytes=1000-"),
        ("/d/a-0.tar", "bytes=3000-"),
    ]


def test_web_servers_that_know_no_ranges(published: Web) -> None:
    published.ranges, published.faults = False, [("cut", 1000)]
    assert same_jpeg(fetched(published).image(2), 2)


@pytest.mark.parametrize("answer", [403, 405, 503])
def test_web_servers_that_do_not_answer_head(published: Web, answer: int) -> None:
    """Without a size nothing is gone on with, and a cut is noticed all the same."""
    published.head, published.faults = answer, [("cut", 1000)]
    assert same_jpeg(fetched(published).image(2), 2)
    assert [wanted for _, wanted in gets(published)] == [None, None]


def test_web_fetches_that_fail_go_on_later(published: Web, tmp_path: Path) -> None:
    published.faults = [("cut", 1000), *[("cut", 0)] * fetch.TRIES]
    refused(
        lambda: fetched(published), "a-0.tar cannot be fetched", "ended after 1000 of", "in 5 tries", "goes on from"
    )
    assert not list(tmp_path.rglob("a-0.tar"))
    published.faults.clear()
    published.asked.clear()
    assert len(fetched(published)) == 3
    assert gets(published) == [("/d/a-0.tar", "bytes=1000-")]


def test_web_refusals(published: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: fetched(published, "b.tar"), f"{published.address}/d/b.tar is not there (HTTP 404)", "address")
    published.faults = [("status", 401)]
    refused(lambda: fetched(published), "a-0.tar is refused (HTTP 401 Unauthorized)")
    published.faults = [("status", 500)] * fetch.TRIES
    refused(lambda: fetched(published), "a-0.tar cannot be fetched (HTTP 500 Internal Server Error) in 5 tries")
    refused(lambda: open_source("wds:http://127.0.0.1:1/d/a.tar"), "http://127.0.0.1:1/d/", "Connection refused")
    refused(lambda: open_source("wds:s3://bucket/a.tar"), "s3:// is not read", "https://")
    refused(lambda: open_source(f"wds:{published.address}/d/*.tar"), "nobody can list", "{000..146}")
    refused(lambda: open_source(f"wds:{published.address}/d/"), "must end in different file names")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    refused(lambda: fetched(published), "lacks space", "0.0 GB are free", "XDG_CACHE_HOME")
    monkeypatch.setitem(sys.modules, "filelock", None)
    refused(lambda: fetched(published), "needs filelock", install_command("wds"))
    assert not list(tmp_path.rglob("*.tar"))


def test_web_servers_that_fall_silent(published: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    published.faults = [("silence", 1000)]
    assert same_jpeg(fetched(published).image(2), 2)
    assert [wanted for _, wanted in gets(published)] == [None, "bytes=1000-"]
    published.faults = [("silence", 0)] * fetch.TRIES
    refused(lambda: fetched(published, "a-1.tar"), "a-1.tar cannot be fetched (timed out) in 5 tries")


def test_web_shards_are_checked_against_their_index(published: Web, tmp_path: Path) -> None:
    record = {"url": "a-0.tar", "filesize": len(published.files["/d/a-0.tar"]), "sha256": "0" * 64}
    published.files["/d/index.json"] = json.dumps({"shardlist": [record]}).encode()
    refused(lambda: fetched(published), "a-0.tar is not the file whose SHA-256 index.json", "again")
    published.files["/d/index.json"] = json.dumps({"shardlist": [record | {"filesize": 5000}]}).encode()
    refused(lambda: fetched(published), "where 5000 were promised")
    published.files["/d/index.json"] = b'{"shardlist": [3]}'
    refused(lambda: fetched(published), "index.json is no index of shards")
    published.files["/d/index.json"] = b"<html>"
    refused(lambda: fetched(published), "index.json is not JSON")
    assert not list(tmp_path.rglob("*.tar"))


def test_web_on_a_full_disk(published: Web, full_disk: Callable[[int], Any]) -> None:
    with full_disk(500):
        refused(lambda: fetched(published), "cannot be written (File too large)", "ulimit -f")


# --- hf -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with a cache of its own."""
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra 'hf'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    return datasets


@pytest.fixture
def rows(hub: Any, tmp_path: Path) -> Path:
    """A folder with 11 rows of several columns, the image ``i`` that of seed ``i``."""
    kinds = hub.Features(
        {
            "image": hub.Image(),
            "animal": hub.ClassLabel(names=["cat", "dog", "emu"]),
            "number": hub.Value("int32"),
            "name": hub.Value("string"),
            "some": hub.ClassLabel(names=["a", "b"]),
        }
    )
    columns = {
        "image": [{"bytes": jpeg(i), "path": None} for i in range(11)],
        "animal": [i % 3 for i in range(11)],
        "number": [i % 4 for i in range(11)],
        "name": ["yx"[i % 2] for i in range(11)],
        "some": [-1] * 11,
    }
    path = tmp_path / "rows"
    path.mkdir()
    hub.Dataset.from_dict(columns, features=kinds).to_parquet(str(path / "train.parquet"))
    return path


STREAM = "&streaming=true&window=4"


@pytest.mark.parametrize("stream", ["", STREAM])
@pytest.mark.parametrize("file", ["", "/train.parquet"])
def test_hf(rows: Path, file: str, stream: str) -> None:
    source = open_source(f"hf:{rows}{file}?label=animal{stream}")
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.tolist() == [i % 3 for i in range(11)]
    assert source.labels.dtype == np.int64
    assert all(same_jpeg(source.image(index), index) for index in (10, 0, 5, 4, 9))
    assert source.where(4) == f"row 4 of {source.name}"


@pytest.mark.parametrize("stream", ["", STREAM])
def test_hf_classes(rows: Path, stream: str) -> None:
    numbers = open_source(f"hf:{rows}?label=number{stream}")
    assert (numbers.classes, numbers.labels.tolist()) == (("0", "1", "2", "3"), [i % 4 for i in range(11)])
    names = open_source(f"hf:{rows}?label=name{stream}")
    assert (names.classes, names.labels[:3].tolist()) == (("x", "y"), [1, 0, 1])
    none = open_source(f"hf:{rows}?label=none{stream}")
    assert (none.classes, none.labels.tolist()) == (("image",), [0] * 11)


def test_hf_folder_of_images(hub: Any, tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(name)).save(path)
    for stream in ("?streaming=true", ""):
        source = open_source(f"hf:{tmp_path}/animals{stream}")
        assert source.classes == ("cat", "dog")
        assert source.labels.tolist() == [0, 0, 1]
        assert (np.asarray(source.image(2)) == np.asarray(picture(seed=9))).all()
    path.unlink()
    refused(lambda: source.image(2), "row 2 of", f"cannot be read ({path}: No such file", "on_corrupt=skip")


@pytest.mark.parametrize("stream", ["", STREAM])
def test_hf_goes_on_in_the_middle_of_an_epoch(rows: Path, stream: str) -> None:
    name = f"hf:{rows}?label=animal{stream}"
    one = open_source(name)
    same_batches(one, pickle.loads(pickle.dumps(one)), start=14, stop=26)
    same_batches(one, one, start=10, stop=26, workers=1)


def test_a_stream_is_shuffled_within_its_windows(rows: Path) -> None:
    source = open_source(f"hf:{rows}?label=animal{STREAM}")
    data = TrainingSet(source, (8, 8), 3, config(), seed=0)
    epochs = [[data.source_index(g) for g in range(11 * epoch, 11 * epoch + 11)] for epoch in range(3)]
    for order in epochs:
        assert [sorted(order[:4]), sorted(order[4:8]), sorted(order[8:])] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len({tuple(order) for order in epochs}) == 3


def test_the_labels_of_a_stream_are_kept_while_its_files_stay(rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = f"hf:{rows}?label=animal{STREAM}"
    for expected in (True, False):
        open_source(name)
        assert ("reading labels" in capfd.readouterr().err) == expected
    status = (rows / "train.parquet").stat()
    os.utime(rows / "train.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    open_source(name)
    assert "reading labels" in capfd.readouterr().err


def test_hf_corrupt_images(hub: Any, tmp_path: Path) -> None:
    images = [{"bytes": jpeg(0)[:200], "path": None}, None]
    kinds = hub.Features({"image": hub.Image()})
    hub.Dataset.from_dict({"image": images}, features=kinds).to_parquet(str(tmp_path / "x.parquet"))
    for stream in ("", "&streaming=true"):
        source = open_source(f"hf:{tmp_path}/x.parquet?label=none{stream}")
        for index, problem in enumerate(("cannot be decoded", "has no image")):
            refused(lambda i=index: source.image(i), f"row {index} of hf:", problem, "on_corrupt=skip")  # noqa: B023
            with pytest.raises(CorruptImage):
                source.image(index)


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("", ["several columns for the label", "?label=COLUMN", "label=none", "animal, image, name, number, some"]),
        ("?label=animla", ["no column 'animla'", "did you mean 'animal'?"]),
        ("?image=img", ["no column 'img'"]),
        ("?image=name&label=none", ["column 'name' is not of images but of Value"]),
        ("?label=image", ["column 'image' holds no classes"]),
        ("?label=some", ["row 0 has class -1", "another split", "label=none"]),
        ("?label=animal&split=test", ["cannot be read", "test"]),
        ("?config=big&label=animal", ["cannot be read", "'big' not found"]),
        ("?lable=label", ["no setting 'lable'", "did you mean 'label'?"]),
        ("?label=", ["label= lacks its value"]),
        ("?streaming=yes", ["streaming is true or false, not 'yes'"]),
        ("?streaming=true&window=0", ["window is a number of images", "'0'"]),
        ("?streaming=true&label=some", ["row 0 has class -1"]),
        ("@test", ["write hf:", "?split=test"]),
    ],
)
def test_hf_names_that_will_not_do(rows: Path, query: str, parts: list[str]) -> None:
    refused(lambda: open_source(f"hf:{rows}{query}"), *parts)


def test_hf_identifiers_are_no_classes() -> None:
    """A name for each number up to the highest would fill the memory."""
    values = np.array([3, 99_999])
    assert len(hf._labels("hf:x", "id", values, {"id": None}, 2)[1]) == 100_000
    values[1] = 10**15
    way_out = ("row 1 of column 'id' has class 1000000000000000", "below 100000", "label=none")
    refused(lambda: hf._labels("hf:x", "id", values, {"id": None}, 2), *way_out)


def test_hf_paths_that_will_not_do(rows: Path, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: open_source("hf:"), "'hf:'", "hf:PATH")
    refused(lambda: open_source(f"hf:{tmp_path}/none"), f"{tmp_path}/none does not exist")
    (tmp_path / "a.txt").write_text("")
    refused(lambda: open_source(f"hf:{tmp_path}/a.txt"), "a.txt is none of .parquet, .arrow")
    (rows / "state.json").write_text("{}")
    refused(lambda: open_source(f"hf:{rows}"), "save_to_disk", "to_parquet")
    (rows / "state.json").unlink()
    (rows / "train.parquet").write_bytes((rows / "train.parquet").read_bytes()[:1000])
    for stream in ("", STREAM):
        refused(lambda: open_source(f"hf:{rows}?label=animal{stream}"), "cannot be read")  # noqa: B023
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: open_source("hf:cifar10"), "'hf:cifar10' needs datasets", install_command("hf"))


def test_a_stream_that_ends_early(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = open_source(f"hf:{rows}?label=animal{STREAM}")
    monkeypatch.setattr(source, "_rows", source._rows.take(6))
    assert same_jpeg(source.image(5), 5)
    refused(lambda: source.image(6), "ended at row 6 of 11", "start again")

    class Broken:
        def shard(self, *_: int) -> object:
            raise ConnectionError("the Hub\nhung up")

    other = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(other, "_rows", Broken())
    refused(lambda: other.image(0), source.name, "cannot be read: the Hub hung up")


def test_importing_pra_brings_none_of_the_extras() -> None:
    check = "import sys, pra, pra.cli; print(*sorted({'datasets', 'pyarrow', 'braceexpand'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
