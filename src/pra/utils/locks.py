"""Keep two commands from filling one folder at the same time."""

from __future__ import annotations

import contextlib
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pra.errors import PraError
from pra.utils.files import read_regular, unwritten

LOCK = ".lock"
"""File in a locked folder that names the process at work."""


@contextmanager
def locked(folder: Path, work: str, fix: str) -> Iterator[None]:
    """Lock a folder while the block runs. Make it if it is missing, and remove it again if it stays empty.

    The operating system holds the lock, so the lock ends with the process. A file system without locks is warned about.
    In the message, ``work`` names the activity ("trained"), and ``fix`` how to avoid it ("choose another --out").
    A folder where another process works, or that cannot be made, is a PraError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error) from None
    path = folder / LOCK
    there = path.exists()
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise PraError(f"{path} is not a regular file. Remove it", code="unwritable", path=path)
    # It retries where a holder ends between two calls. A soft lock would outlive a killed process.
    lock = FileLock(path, timeout=0.2, fallback_to_soft=False)
    held = None
    try:
        try:
            lock.acquire()
            held = path.stat()
        except Timeout:
            holder = holder_of(folder) or "another process"
            message = f"{folder} is being {work} by {holder} already; stop that or wait for it, or {fix}"
            raise PraError(message, code="busy", path=folder) from None
        except (OSError, NotImplementedError) as error:  # some network file systems
            reason = getattr(error, "strerror", error)
            warnings.warn(f"{path} cannot be locked ({reason}). Do not run another command in {folder}", stacklevel=3)
            if not there:
                with contextlib.suppress(OSError):
                    path.unlink()
        else:
            with contextlib.suppress(OSError):  # on a full disk the holder stays unnamed
                path.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        with contextlib.suppress(OSError):
            # The file may be another command's by now. Remove it before the release: nobody else can hold it.
            if held is not None and os.path.samestat(held, path.stat()):
                path.unlink()
        lock.release()
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def holder_of(folder: Path) -> str | None:
    """Return the process that has locked a folder, as it calls itself, or ``None``."""
    try:
        return read_regular(folder / LOCK, 1000).decode(errors="replace").strip()
    except OSError:
        return None
