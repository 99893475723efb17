"""Keeps two commands from filling one folder at the same time."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pra.errors import PraError
from pra.utils.files import remedy

LOCK = ".lock"
"""The file in a folder that names the process at work there, as long as it is."""


@contextmanager
def locked(folder: Path, work: str, way_out: str) -> Iterator[None]:
    """Keeps other commands off a folder that this one fills. It is made where it is missing, and goes again where it
    stays empty.

    The lock is the operating system's: it ends with the process that holds it, however that ends. Where the system has
    none, nothing is locked; where the file system refuses, there is a warning.

    Args:
        folder: to be locked.
        work: what is done there, for the message: "trained".
        way_out: what else the other command may do, likewise: "choose another --run-dir".

    Raises:
        PraError: another process works there, or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PraError(f"{folder} cannot be written: {error.strerror}; {remedy(error)}") from None
    try:
        descriptor = _lock(folder / LOCK, work, way_out)
        try:
            yield
        finally:
            if descriptor in _held:
                _unlock(descriptor, folder / LOCK)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it has something in it
                path.rmdir()


def holder_of(folder: Path) -> str | None:
    """Which process has locked a folder, as it says; None where none has."""
    try:
        return (folder / LOCK).read_text(errors="replace").strip()
    except OSError:
        return None


_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _let_go() -> None:
    """In a forked worker: its copies would keep the locks of a process that was killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def _lock(path: Path, work: str, way_out: str) -> int | None:
    """Locks a file, which is made where it is missing: its descriptor; None where that cannot be done."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:  # what is to be written there will say more
            _warn_unlocked(path, error)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = holder_of(path.parent) or "another process"
            os.close(descriptor)
            raise PraError(
                f"{path.parent} is being {work} by {holder} already; stop that or wait for it, or {way_out}"
            ) from None
        except OSError as error:  # some network file systems
            _unlock(descriptor, path)
            _warn_unlocked(path, error)
            return None
        if _lies_at(descriptor, path):
            break
        os.close(descriptor)  # its holder ended, and removed it, between the two calls
    _held.add(descriptor)
    with contextlib.suppress(OSError):  # on a full disk the holder goes unnamed
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    return descriptor


def _unlock(descriptor: int, path: Path) -> None:
    """Removes the file first, while nobody else can hold it."""
    with contextlib.suppress(OSError):
        if _lies_at(descriptor, path):
            path.unlink()
    _held.discard(descriptor)
    os.close(descriptor)


def _lies_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _warn_unlocked(path: Path, error: OSError) -> None:
    warnings.warn(
        f"{path} cannot be locked ({error.strerror}): see to it that no other command works in {path.parent}",
        stacklevel=2,
    )
