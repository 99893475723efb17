"""A stand-in of the Hub: the part of its HTTP interface that its own client library uses for models."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_ofalice"
MODEL = r"(?:/api/models)?/([^/]+/[^/]+)"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Files by commit, the newest last."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files):
        """Adds or replaces files; the hash of the commit."""
        merged = {**(list(self.commits.values())[-1] if self.commits else {}), **files}
        number = hashlib.sha1(repr((len(self.commits), sorted(merged.items()))).encode()).hexdigest()
        self.commits[number] = merged
        return number


@dataclass
class Hub:
    """The state of the stand-in: its models, its requests (method and path), and whether there is a network.

    ``http`` is the HTTP library that the Hub's own library uses: httpx, or newer ones httpx2.
    """

    http: Any
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    reachable: bool = True

    def answer(self, request):
        if not self.reachable:
            raise self.http.ConnectError("no network")
        path, known = request.url.path, request.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.requests.append(f"{request.method} {path}")
        if request.method != "POST":
            return self._read(path, known)
        if path == "/api/validate-yaml":
            return self.http.Response(200, json={"warnings": [], "errors": []})
        return self._write(path, request.read()) if known else self._refusal(401)

    def _write(self, path, body):
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            return self._create(lines[0])
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in lines[0]["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.http.Response(200, json={"files": modes})
        name = re.fullmatch(rf"{MODEL}/commit/main", path)[1]
        files = [line["value"] for line in lines if line["key"] == "file"]
        number = self.repositories[name].commit({file["path"]: base64.b64decode(file["content"]) for file in files})
        url = f"https://huggingface.co/{name}/commit/{number}"
        return self.http.Response(200, json={"commitUrl": url, "commitOid": number})

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "alice":
            return self._refusal(403)
        there = name in self.repositories
        if not there:
            # ``visibility`` is how newer client libraries say it.
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.repositories[name] = Repository(private)
            self.repositories[name].commit({".gitattributes": b""})
        return self.http.Response(409 if there else 200, json={"url": f"https://huggingface.co/{name}"})

    def _read(self, path, known):
        match = re.fullmatch(rf"{MODEL}(?:/(revision|tree|resolve)/([^/]+))?(?:/(.+))?", path)
        repository = self.repositories.get(match[1]) if match else None
        if match is None or repository is None or (repository.private and not known):
            return self._refusal(404 if known else 401, "RepoNotFound")
        commit = list(repository.commits)[-1] if match[3] in (None, "main") else match[3]
        files = repository.commits.get(commit)
        if files is None:
            return self._refusal(404, "RevisionNotFound")
        if match[2] in ("tree", "resolve") and repository.gated:
            return self._refusal(403, "GatedRepo")
        if match[2] == "tree":
            listed = [{"type": "file", "path": n, "size": len(b), "oid": _blob(b)} for n, b in files.items()]
            return self.http.Response(200, json=listed)
        if match[2] != "resolve":
            names = [{"rfilename": name} for name in files]
            told = {"id": match[1], "sha": commit, "private": repository.private, "siblings": names}
            return self.http.Response(200, json=told)
        if match[4] not in files:
            return self._refusal(404, "EntryNotFound")
        content = files[match[4]]
        return self.http.Response(
            200, content=content, headers={"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit}
        )

    def _refusal(self, status, code=""):
        headers = {"X-Error-Message": "refused"} | ({"X-Error-Code": code} if code else {})
        return self.http.Response(status, headers=headers)


def _blob(content):
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
