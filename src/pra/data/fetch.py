"""Files from the web into a folder: whole, checked, resumable. huggingface_hub does the requests."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from pra.errors import PraError, reason_of
from pra.utils.extras import import_failed
from pra.utils.files import remedy
from pra.utils.progress import Progress
from pra.utils.provenance import file_sha256

TIMEOUT = 30.0
"""Seconds that a server may take to answer."""
_AT_ONCE, _TRIES = 4, 5
_PLAIN = {"Accept-Encoding": "identity"}  # a compressed answer has another size and no ranges


class Promise(NamedTuple):
    """The size in bytes and the SHA-256 of a file, as far as they are known beforehand."""

    size: int | None = None
    sha256: str | None = None


def fetch_all(urls: Sequence[str], folder: Path, promises: Mapping[str, Promise]) -> list[Path]:
    """Fetch the files that a folder lacks, several at once, and return all. An interrupted fetch resumes.

    A file appears under its name when it is whole. If several processes call this, one fetches and the others wait.

    Raises:
        PraError: a server cannot be reached or refuses, a file is not what was promised, or the disk is full.
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
    """Return the contents of a file, or None if the server does not have or give it."""
    response = _asked("GET", url)
    return bytes(response.content) if response.is_success else None


def name_of(url: str) -> str:
    """Return the last part of the address's path."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


def _hub() -> Any:
    try:
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        text = import_failed("fetching data from the web", "huggingface_hub", "wds", error)
        raise PraError(text, "not-installed") from None
    return huggingface_hub


class _Bar(Progress):
    """One bar for all files. If one file fails, the others stop at their next block."""

    stopped = False

    def update(self, n: float | None = 1) -> Any:
        if self.stopped:
            raise CancelledError
        return super().update(n)


def _fetch_missing(missing: Mapping[Path, str], folder: Path, promises: Mapping[str, Promise]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        known = [promises.get(file.name, Promise()) for file in missing]
        promised = list(pool.map(_sized, missing.values(), known))
        there = sum(part.stat().st_size for part in map(_part, missing) if part.exists())
        total = sum(promise.size or 0 for promise in promised)
        if total - there > (free := shutil.disk_usage(folder).free):
            problem = f"{(total - there) / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free"
            fix = "Set XDG_CACHE_HOME to a folder on a larger disk, or take fewer shards"
            raise PraError(f"{folder} lacks space: {problem}. {fix}", "too-large", path=folder)
        with _Bar(desc="fetching", total=total or None, initial=there, unit="B", unit_scale=True) as bar:
            try:
                list(pool.map(lambda file, promise: _fetch(missing[file], file, promise, bar), missing, promised))
            except BaseException:
                bar.stopped = True
                raise


def _sized(url: str, promise: Promise) -> Promise:
    """Add the size that the server names, if it does; a missing file is noticed before anything is fetched."""
    if promise.size is not None:
        return promise
    response = _asked("HEAD", url, retry_on_status_codes=())
    if response.status_code in (404, 410):
        raise _unreachable(url, f"HTTP {response.status_code}")
    length = response.headers.get("Content-Length") if response.is_success else None
    return promise._replace(size=int(length) if length else None)


def _asked(method: str, url: str, **options: Any) -> Any:
    hub = _hub()
    try:
        return hub.utils.http_backoff(method, url, headers=_PLAIN, timeout=TIMEOUT, **options)
    except Exception as error:
        raise _unreachable(url, error) from None


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
            _download(url, target, bar)
            target.flush()
            os.fsync(target.fileno())
    if promise.size not in (None, part.stat().st_size) or (promise.sha256 and file_sha256(part) != promise.sha256):
        part.unlink()
        fix = "Fetch it again, or repair it there"
        raise PraError(f"{url} has not the size or SHA-256 that index.json promises. {fix}", "mismatch", url=url)
    part.replace(file)


def _download(url: str, target: IO[bytes], bar: _Bar) -> None:
    hub, left = _hub(), _TRIES
    while True:
        there = target.tell()
        headers = _PLAIN | ({"Range": f"bytes={there}-"} if there else {})
        try:
            # Retries server errors (5xx). Its own retries of connections would begin the file again.
            answer = hub.utils.http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT, retry_on_exceptions=())
            with answer as response:
                response.raise_for_status()
                if there and response.status_code != 206:  # a server without ranges
                    target.seek(0)
                    target.truncate()
                    bar.update(-there)
                for block in response.iter_bytes():
                    target.write(block)
                    bar.update(len(block))
                return
        except hub.errors.HTTPError as error:
            left = _TRIES if target.tell() > there else left - 1
            if hasattr(error, "response") or not left:
                raise _unreachable(url, error) from None
            time.sleep(1)


def _unreachable(url: str, reason: object) -> PraError:
    status = getattr(getattr(reason, "response", None), "status_code", None)
    text = f"HTTP {status}" if status else reason_of(reason)
    fix = "Check the address and the network; the same command resumes"
    return PraError(f"{url} cannot be fetched ({text}). {fix}", "unreachable", url=url, reason=text)
