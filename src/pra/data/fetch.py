"""Files from the web into a folder: whole, checked, resumable."""

from __future__ import annotations

import functools
import io
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from filelock import FileLock

from pra.errors import PraError, reason_of
from pra.utils.files import MOST_JSON, remedy
from pra.utils.progress import Progress
from pra.utils.provenance import file_sha256

TIMEOUT = 30.0
"""Seconds that a server may take to answer."""
_AT_ONCE, _TRIES = 4, 5
_HEADERS = {"User-Agent": "pra", "Accept-Encoding": "identity"}  # a compressed answer has another size and no ranges


class Promise(NamedTuple):
    """The expected size in bytes and SHA-256 of a file, or None where unknown."""

    size: int | None = None
    sha256: str | None = None


def fetch_all(urls: Sequence[str], folder: Path, promises: Mapping[str, Promise]) -> list[Path]:
    """Fetch the files that a folder lacks, several at once, and return all. An interrupted fetch resumes.

    A file appears under its name when it is whole. If several processes call this, one fetches and the others wait.

    Raises:
        PraError: a server cannot be reached or refuses, a file has another size or hash, or the disk is full.
    """
    files = [folder / name_of(url) for url in urls]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all(file.exists() for file in files):
            with FileLock(folder / ".lock"):
                missing = {file: url for file, url in zip(files, urls, strict=True) if not file.exists()}
                _fetch_missing(missing, folder, promises)
    except OSError as error:
        path, fix = error.filename or folder, remedy(error)
        raise PraError(f"{path} cannot be written ({error.strerror}). {fix}", "unwritable", path=path) from None
    return files


def fetch_small(url: str) -> bytes | None:
    """Return the contents of a file of JSON, or None if the server does not have or give it."""
    target = io.BytesIO()

    def bounded(_: int) -> None:
        if target.tell() > MOST_JSON:
            raise PraError(f"{url} has more than {MOST_JSON:,} bytes. Repair it there", "too-large", url=url)

    try:
        _download(url, target, bounded)
    except PraError as error:
        if _refuses(error.fields.get("status")):
            return None
        raise
    return target.getvalue()


def name_of(url: str) -> str:
    """Return the last part of the address's path."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


def _client() -> Any:
    return _client_of(os.getpid(), *sorted(getproxies().items()))


@functools.cache
def _client_of(process: int, *proxies: tuple[str, str]) -> Any:
    """Return a client of its own for each process, as a fork would share connections, and each set of proxies."""
    import httpx2

    return httpx2.Client(headers=_HEADERS, follow_redirects=True)


class _Bar(Progress):
    """One bar for all files. If one file fails, the others stop at their next block."""

    stopped = False

    def update(self, n: float | None = 1) -> Any:
        if self.stopped:
            raise CancelledError
        return super().update(n)


def _fetch_missing(missing: Mapping[Path, str], folder: Path, promises: Mapping[str, Promise]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        promised = list(pool.map(lambda file: _sized(missing[file], promises.get(file.name, Promise())), missing))
        there = sum(part.stat().st_size for part in map(_part, missing) if part.exists())
        total = sum(promise.size or 0 for promise in promised)
        if total - there > (free := shutil.disk_usage(folder).free):
            problem = f"lacks space: {(total - there) / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free"
            fix = "Set XDG_CACHE_HOME to a folder on a larger disk, or take fewer shards"
            raise PraError(f"{folder} {problem}. {fix}", "too-large", path=folder)
        with _Bar(desc="fetching", total=total or None, initial=there, unit="B", unit_scale=True) as bar:
            try:
                list(pool.map(lambda file, promise: _fetch(missing[file], file, promise, bar), missing, promised))
            except BaseException:
                bar.stopped = True
                raise


def _sized(url: str, promise: Promise) -> Promise:
    """Add the size that the server names, if it does; a missing file is noticed before anything is fetched."""
    import httpx2

    if promise.size is not None:
        return promise
    try:
        response = _client().head(url, timeout=TIMEOUT)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return promise
    if response.status_code in (404, 410):
        raise _unreachable(url, f"HTTP {response.status_code}", response.status_code)
    length = response.headers.get("Content-Length") if response.is_success else None
    return promise._replace(size=int(length) if length else None)


def _part(file: Path) -> Path:
    return file.with_name(f".{file.name}.part")


def _fetch(url: str, file: Path, promise: Promise, bar: _Bar) -> None:
    part = _part(file)
    there = part.stat().st_size if part.exists() else 0
    if there and (promise.size is None or there > promise.size):  # it may belong to another file
        part.unlink()
        bar.update(-there)
    with part.open("ab") as target:
        if target.tell() != promise.size:
            _download(url, target, bar.update)
            target.flush()
            os.fsync(target.fileno())
    if promise.size not in (None, part.stat().st_size) or (promise.sha256 and file_sha256(part) != promise.sha256):
        part.unlink()
        fix = "Fetch it again, or repair it there"
        raise PraError(f"{url} does not have the size or SHA-256 in index.json. {fix}", "mismatch", url=url)
    part.replace(file)


def _download(url: str, target: IO[bytes], advance: Callable[[int], object] = lambda _: None) -> None:
    """Append the rest of a file, in as many connections as that takes."""
    import httpx2

    failures = 0
    while True:
        there = target.tell()
        headers = {"Range": f"bytes={there}-"} if there else {}
        try:
            with _client().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
                response.raise_for_status()
                if there and response.status_code != 206:  # a server without ranges
                    target.seek(0)
                    target.truncate()
                    advance(-there)
                for block in response.iter_raw():
                    target.write(block)
                    advance(len(block))
                return
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            failures = 1 if target.tell() > there else failures + 1
            status = error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else None
            if failures == _TRIES or _refuses(status) or isinstance(error, httpx2.InvalidURL):
                raise _unreachable(url, f"HTTP {status}" if status else reason_of(error), status) from None
            time.sleep(2 ** (failures - 1))


def _refuses(status: object) -> bool:
    """Return whether another try gets the same answer."""
    return isinstance(status, int) and status < 500 and status not in (408, 429)


def _unreachable(url: str, reason: str, status: int | None) -> PraError:
    fix = "Check the address and the network; the same command resumes"
    return PraError(f"{url} cannot be fetched ({reason}). {fix}", "unreachable", url=url, reason=reason, status=status)
