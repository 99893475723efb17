"""Files from the web into a folder: whole, checked, resumable."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pra.errors import PraError, reason_of
from pra.utils.extras import import_failed
from pra.utils.files import remedy
from pra.utils.progress import Progress
from pra.utils.provenance import file_sha256

TIMEOUT = 30.0
"""Seconds without a byte before a connection is given up."""
TRIES = 5
"""In a row without a byte, for each file."""
PAUSE = 1.0
"""Seconds before the second try; doubled before each later one."""
_AT_ONCE = 4
_BLOCK = 1 << 20
_LATER = (408, 429)
"""HTTP's answers of the kind "your mistake" that another try may change."""


class Promise(NamedTuple):
    """What is known about a file beforehand."""

    size: int | None = None
    sha256: str | None = None


class _Broken(Exception):  # noqa: N818  reads as what it is
    """A connection that failed; another try may do."""


def fetch_all(urls: Sequence[str], folder: Path, promises: Mapping[str, Promise]) -> list[Path]:
    """Bring files into a folder, several at once; those that are there already are not fetched again.

    A file appears under its name when it is whole. What an interrupted fetch left is kept, and gone on with. Of several
    processes one fetches, the others wait.

    Args:
        urls: with different names at the end.
        folder: made where it is missing.
        promises: by name.

    Returns:
        The files, one per URL.

    Raises:
        PraError: a server that cannot be reached or says no, a file that is not what was promised, or a disk with too
            little space.
    """
    files = [folder / name_of(url) for url in urls]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if all(file.exists() for file in files):
            return files
        with _lock(folder / ".lock"):
            missing = {file: url for file, url in zip(files, urls, strict=True) if not file.exists()}
            _fetch_missing(missing, folder, promises)
    except OSError as error:
        raise PraError(f"{error.filename or folder} cannot be written ({error.strerror}); {remedy(error)}") from None
    return files


def fetch_small(url: str) -> bytes | None:
    """The contents of a file that may not be there (None).

    Raises:
        PraError: the server cannot be reached.
    """
    for attempt in range(TRIES):
        try:
            with _get(url, {}) as response:
                return response.read()  # type: ignore[no-any-return]
        except PraError:  # some stores answer "forbidden" for what they do not have
            return None
        except _Broken as error:
            reason = error
            _pause(attempt)
    raise _unreachable(url, reason, "check the address and the network")


def name_of(url: str) -> str:
    """The last part of the address's path."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


# --- many ---------------------------------------------------------------------------------------------------


def _lock(path: Path) -> Any:
    try:
        from filelock import FileLock
    except ImportError as error:
        raise PraError(import_failed("fetching data from the web", "filelock", "wds", error)) from None
    return FileLock(path)


def _fetch_missing(missing: Mapping[Path, str], folder: Path, promises: Mapping[str, Promise]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        known = [promises.get(file.name, Promise()) for file in missing]
        asked = pool.map(lambda pair: pair[1].size or _size(pair[0]), zip(missing.values(), known, strict=True))
        promised = {file: Promise(size, p.sha256) for file, size, p in zip(missing, asked, known, strict=True)}
        there = sum(_partial(file).stat().st_size for file in missing if _partial(file).exists())
        total = sum(promise.size or 0 for promise in promised.values())
        _check_space(total - there, folder)
        with Progress(desc="fetching", total=total or None, initial=there, unit="B", unit_scale=True) as bar:
            progress = _Progress(bar)
            work = [pool.submit(_fetch, url, file, promised[file], progress) for file, url in missing.items()]
            try:
                for done in work:
                    done.result()
            except BaseException:
                progress.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise


class _Progress:
    """The bar of all files; where one of them fails, the others stop at their next block."""

    def __init__(self, bar: Progress) -> None:
        self.stopped = False
        self._bar = bar

    def add(self, count: int) -> None:
        if self.stopped:
            raise CancelledError
        self._bar.update(count)


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PraError(
            f"{folder} lacks space: {needed / 1e9:.1f} GB are to be fetched and {free / 1e9:.1f} GB are free; "
            "set XDG_CACHE_HOME to a folder on a larger disk, or take fewer shards"
        )


def _size(url: str) -> int | None:
    """As the server says before it sends, if it does; a missing file is found here, before anything is fetched."""
    with contextlib.suppress(_Broken), _get(url, {}, "HEAD") as response:
        return int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
    return None


# --- one ----------------------------------------------------------------------------------------------------


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.part")


def _fetch(url: str, file: Path, promise: Promise, progress: _Progress) -> None:
    """One file, in as many connections as it takes."""
    part, attempt = _partial(file), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _go_on(url, part, promise.size, progress)
            break
        except _Broken as error:
            attempt = 1 if part.exists() and part.stat().st_size > before else attempt + 1
            if attempt == TRIES:
                raise _unreachable(url, error, f"the same command goes on from {part}") from None
            _pause(attempt - 1)
    if promise.sha256 and file_sha256(part) != promise.sha256:
        part.unlink()
        raise PraError(
            f"{url} is not the file whose SHA-256 index.json beside it names; fetch it again, or mend it there"
        )
    part.replace(file)


def _go_on(url: str, part: Path, size: int | None, progress: _Progress) -> None:
    """What is missing of a file, by one connection; it is whole when this returns."""
    there = part.stat().st_size if part.exists() else 0
    if there == size:
        return
    if size is None or there > size:  # nobody can say that what is there belongs to it
        part.unlink(missing_ok=True)
        progress.add(-there)
        there = 0
    with _get(url, {"Range": f"bytes={there}-"} if there else {}) as response, part.open("ab") as file:
        if response.status != 206 and there:  # a server that knows no ranges begins again
            file.truncate(0)
            progress.add(-there)
            there = 0
        length = response.headers["Content-Length"]
        expected = there + int(length) if length else size
        for block in _blocks(response):
            file.write(block)
            there += len(block)
            progress.add(len(block))
        file.flush()
        os.fsync(file.fileno())
    if expected is not None and there < expected:
        raise _Broken(f"the connection ended after {there} of {expected} bytes")
    if size is not None and there != size:
        part.unlink()
        raise PraError(f"{url} has {there} bytes where {size} were promised; it changed, or is damaged there")


def _blocks(response: Any) -> Iterator[bytes]:
    try:
        while block := response.read1(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from None


def _get(url: str, headers: dict[str, str], method: str = "GET") -> Any:
    """An open connection.

    Raises:
        PraError: it says no, for a reason that will last.
        _Broken: no answer, or one that says "later".
    """
    request = urllib.request.Request(url, headers={"User-Agent": "pra", **headers}, method=method)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise PraError(f"{url} is not there (HTTP {error.code}); check the address") from None
        lasting = 400 <= error.code < 500 and error.code not in _LATER
        if lasting and not (method == "HEAD" and error.code in (403, 405)):  # which some answer to HEAD alone
            raise PraError(
                f"{url} is refused (HTTP {error.code} {error.reason}); check the address and your rights"
            ) from None
        raise _Broken(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from None


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return reason_of(getattr(reason, "strerror", None) or reason)


def _unreachable(url: str, reason: Exception, way_out: str) -> PraError:
    return PraError(f"{url} cannot be fetched ({reason}) in {TRIES} tries; {way_out}")


def _pause(attempt: int) -> None:
    time.sleep(PAUSE * 2**attempt)
