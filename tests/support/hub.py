"""A stand-in of the Hub on this machine: the part of its HTTP interface that its own client library uses for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ofalice"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Files by commit, the newest last."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        """Adds or replaces files; the hash of the commit."""
        merged = {**(list(self.commits.values())[-1] if self.commits else {}), **files}
        number = hashlib.sha1(repr((len(self.commits), sorted(merged.items()))).encode()).hexdigest()
        self.commits[number] = merged
        return number

    def resolve(self, revision: str) -> str | None:
        """The commit of a hash, or of the branch main."""
        return list(self.commits)[-1] if revision == "main" else revision if revision in self.commits else None


@dataclass
class Hub:
    """What is on it, what was asked of it (method and path), and where it listens."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving() -> Iterator[Hub]:
    """An empty Hub, as long as the block runs."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif not self._known():
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]
            self._json({"files": modes})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            number = self.state.repositories[match[1]].commit(files)
            self._json({"commitUrl": f"{self.state.url}/{match[1]}/commit/{number}", "commitOid": number})
        else:
            self._refuse(404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "alice":
            self._refuse(403, "", "You don't have the rights to create a model under this namespace")
        elif name in self.state.repositories:
            self._json({"url": f"{self.state.url}/{name}", "error": "You already created this model repo"}, 409)
        else:
            self.state.repositories[name] = Repository(private=_private(asked))
            self.state.repositories[name].commit({".gitattributes": b""})
            self._json({"url": f"{self.state.url}/{name}"})

    def _read(self) -> None:
        path = self._path()
        match = re.match(r"(/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+))?(?:/(.+))?$", path)
        repository = self.state.repositories.get(match[2]) if match else None
        if match is None or repository is None or (repository.private and not self._known()):
            self._refuse(404 if self._known() else 401, "RepoNotFound", "Repository not found")
            return
        number = repository.resolve(match[4] or "main")
        if number is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {match[4]}")
        elif match[3] in ("tree", "resolve") and repository.gated:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif match[3] == "tree":
            files = repository.commits[number].items()
            self._json([{"type": "file", "path": n, "size": len(b), "oid": _blob(b)} for n, b in files])
        elif match[3] == "resolve":
            self._file(repository.commits[number].get(match[5]), number)
        else:
            names = [{"rfilename": name} for name in repository.commits[number]]
            self._json({"id": match[2], "sha": number, "private": repository.private, "siblings": names})

    def _file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        self._send(200, content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        return path

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _json(self, values: Any, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str = "", message: str = "not found") -> None:
        self._send(status, b"", {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _blob(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _private(asked: dict[str, Any]) -> bool:
    """``visibility`` is how newer client libraries say it."""
    return asked.get("private") is True or asked.get("visibility") == "private"
