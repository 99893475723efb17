"""Shards on the web, from a server on this machine."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from support.data import same_jpeg, shard
from support.refusal import refused

from pra.data import fetch, open_source
from pra.utils.extras import install_command


@dataclass
class Web:
    """A server: its files, its requests, and its faults.

    ``faults`` are taken one by one by GET requests for shards: a status to answer, or the bytes after which to hang up
    or to fall silent. ``pauses`` are the seconds between two tries.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    faults: list[tuple[str, int]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    ranges: bool = True
    head: int = 200

    @property
    def gets(self):
        """The GET requests for shards: path and range."""
        return [(path, wanted) for command, path, wanted in self.asked if command == "GET" and path.endswith(".tar")]

    def open(self, name="a-0.tar"):
        return open_source(f"wds:{self.address}/d/{name}")

    def refused(self, *parts, name="a-0.tar", code="unreachable"):
        refused(lambda: self.open(name), *parts, code=code, url=f"{self.address}/d/{name}")


@pytest.fixture
def web(monkeypatch):
    """A server with two shards of the images 0 to 4, and the names of their classes."""
    pytest.importorskip("httpx2", reason="httpx2 is in the extra 'wds'")
    files = {"/d/a-0.tar": shard(0, 1, 2), "/d/a-1.tar": shard(3, 4), "/d/classes.json": b'["cat", "dog", "emu"]'}
    state = Web(files=files)
    monkeypatch.setattr(fetch, "time", SimpleNamespace(sleep=state.pauses.append))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # it refuses all servers if HF_HUB_OFFLINE is set

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(state.head)

        def do_GET(self):
            fault, value = state.faults.pop(0) if state.faults and self.path.endswith(".tar") else ("", 0)
            self.answer(value if fault == "status" else 200, value if fault in ("cut", "silence") else None)
            if fault == "silence":
                state.over.wait(10)

        def answer(self, status, cut=None):
            wanted = self.headers["Range"]
            state.asked.append((self.command, self.path, wanted))
            data = state.files.get(self.path)
            if data is None or status != 200:
                self.send_error(404 if data is None else status)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[start:] if cut is None else data[start : start + cut])

        def log_message(self, *_):
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        state.over.set()
        server.shutdown()
        thread.join()


def test_web_shards_are_fetched_once(web, cache, capfd):
    pytest.importorskip("braceexpand", reason="braceexpand is in the extra 'wds'")
    source = web.open("a-{0..1}.tar")
    assert "fetching" in capfd.readouterr().err
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert same_jpeg(source.image(4), 4)
    assert sorted(web.gets) == [("/d/a-0.tar", None), ("/d/a-1.tar", None)]
    web.asked.clear()
    web.files.clear()
    assert web.open("a-{0..1}.tar").classes == ("cat", "dog", "emu")  # from the cache alone
    assert web.asked == []
    [folder] = (cache / "shards").iterdir()
    left = {path.name for path in folder.iterdir() if not path.name.endswith(".npz")}
    assert left - {".lock"} == {"a-0.tar", "a-1.tar", "classes.json"}


def test_web_broken_connections_and_server_errors_resume(web):
    web.faults = [("status", 503), ("cut", 1000), ("status", 500), ("cut", 2000)]
    assert same_jpeg(web.open().image(2), 2)
    assert [wanted for _, wanted in web.gets] == [None] * 2 + ["bytes=1000-"] * 2 + ["bytes=3000-"]
    assert web.pauses == [1, 1, 2, 1]


def test_web_silent_server_is_asked_again(web, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.1)
    web.faults = [("silence", 1000)]
    assert same_jpeg(web.open().image(2), 2)
    assert [wanted for _, wanted in web.gets] == [None, "bytes=1000-"]
    web.faults = [("silence", 0)] * 5
    web.refused("timed out", name="a-1.tar")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_web_busy_server_is_asked_5_times(web, status):
    web.faults = [("status", status)] * 5
    web.refused(f"HTTP {status}")
    assert (len(web.gets), web.pauses) == (5, [1, 2, 4, 8])


@pytest.mark.parametrize(("ranges", "head"), [(False, 200), (True, 401), (True, 403), (True, 405), (True, 503)])
def test_web_server_of_few_features_serves(web, ranges, head):
    web.ranges, web.head, web.faults = ranges, head, [("cut", 1000)]
    assert same_jpeg(web.open().image(2), 2)
    assert [command for command, path, _ in web.asked if path.endswith(".tar")] == ["HEAD", "GET", "GET"]


def test_web_failed_fetch_resumes_with_the_next_command(web, cache):
    web.faults = [("cut", 1000), *[("cut", 0)] * 20]
    web.refused("the same command resumes")
    assert (len(web.gets), web.pauses) == (5, [1, 2, 4, 8])
    web.faults.clear()
    assert not list(cache.rglob("a-0.tar"))
    web.asked.clear()
    assert len(web.open()) == 3
    assert web.gets == [("/d/a-0.tar", "bytes=1000-")]


def test_web_refusals_are_one_line(web, cache, monkeypatch):
    web.refused("HTTP 404", name="b.tar")
    web.faults = [("status", 401)]
    web.refused("HTTP 401")
    assert web.pauses == []
    with monkeypatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:1")
        refused(web.open, "Connection refused", code="unreachable")
    refused(lambda: open_source("wds:http://127.0.0.1:1/d/a.tar"), "http://127.0.0.1:1/d/", code="unreachable")
    for name in ("s3://bucket/a.tar", f"{web.address}/d/*.tar", f"{web.address}/d/"):
        refused(lambda name=name: open_source(f"wds:{name}"), code="invalid", name=f"wds:{name}")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    refused(web.open, "0.0 GB are free", "XDG_CACHE_HOME", code="too-large")
    monkeypatch.setitem(sys.modules, "httpx2", None)
    refused(web.open, install_command("wds"), code="not-installed")
    assert not list(cache.rglob("*.tar"))


def test_web_shards_are_checked_against_their_index(web, cache):
    record = {"url": "a-0.tar", "filesize": len(web.files["/d/a-0.tar"]), "sha256": "0" * 64}
    for wrong in (record, record | {"filesize": 5000, "sha256": None}):
        web.files["/d/index.json"] = json.dumps({"shardlist": [wrong]}).encode()
        web.refused("index.json", code="mismatch")
    for damaged in (b'{"shardlist": [3]}', b"[1]", b"<html>"):
        web.files["/d/index.json"] = damaged
        refused(web.open, code="unreadable", path=f"{web.address}/d/index.json")
    assert not list(cache.rglob("*.tar"))


@pytest.mark.parametrize(
    "shard", [5, {"url": 3}, {"url": "a-0.tar", "filesize": "x"}, {"url": "a-0.tar", "filesize": -1}]
)
def test_web_index_of_wrong_types_is_refused(web, shard):
    web.files["/d/index.json"] = json.dumps({"shardlist": [shard]}).encode()
    refused(web.open, code="unreadable", path=f"{web.address}/d/index.json")


def test_web_index_without_an_end_is_refused(web):
    web.files["/d/index.json"] = bytes(2**25 + 2**20)
    refused(web.open, "33,554,432", code="too-large", url=f"{web.address}/d/index.json")


def test_web_full_disk_is_refused(web, full_disk):
    with full_disk(500):
        refused(web.open, "File too large", "ulimit -f", code="unwritable")
