"""Files that appear whole or not at all, and never overwrite."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pra.errors import PraError
from pra.utils.pixels import contact_sheet, to_pil, to_uint8


def output_format(path: Path) -> str:
    """Return ``".png"``, ``".npz"``, or ``""`` for a folder; ``samples-1.5`` is a folder.

    Raises:
        PraError: another ending.
    """
    suffix = path.suffix.lower()
    if suffix in (".png", ".npz"):
        return suffix
    if suffix[1:2].isalpha():
        message = f"{path}: unknown ending {path.suffix!r}. Use FILE.png, FILE.npz or a folder DIR/"
        raise PraError(message, code="unknown", path=path)
    return ""


def check_output(path: Path) -> None:
    """Refuse a path that exists, cannot be written or has no known format, before any work is done.

    Raises:
        PraError: as :func:`output_format` and :func:`check_free`.
    """
    output_format(path)
    check_free(path)


def check_free(path: Path, fix: str = "choose another --out") -> None:
    """Refuse a path that exists or cannot be written; ``fix`` says how to name another.

    Raises:
        PraError: as said.
    """
    if os.path.lexists(path):
        raise PraError(f"{path} exists already; {fix} or remove it", code="exists", path=path)
    ancestor = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        problem = "cannot be written to" if ancestor.is_dir() else "is a file"
        raise PraError(f"{path} cannot be written: {ancestor} {problem}; {fix}", code="unwritable", path=path)


def first_free(path: Path) -> Path:
    """Return ``path``, or the first of ``NAME-2.png``, ``NAME-3.png`` and so on that does not exist."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not os.path.lexists(place))


def save_images(images: Tensor, labels: Sequence[int], names: Sequence[str], columns: int, path: Path) -> None:
    """Write images by the path's ending: one PNG (a contact sheet, or a single image), an npz, or a folder.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1], or uint8.
        labels: one per image.
        names: file names without ending, one per image, all different; for a folder.
        columns: of the contact sheet.
        path: ``FILE.png``; ``FILE.npz`` with ``arr_0`` uint8 NHWC and ``arr_1`` labels (the layout of ADM's
            evaluator); or a folder.

    Raises:
        PraError: as :func:`check_output`, or the disk refuses.
    """
    check_output(path)
    if output_format(path) == ".png":
        write_atomically(path, lambda file: contact_sheet(images, columns).save(file, "PNG"))
    elif output_format(path) == ".npz":
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        write_atomically(path, lambda file: np.savez(file, arr_0=pixels, arr_1=np.asarray(labels, np.int64)))
    else:
        with new_folder(path) as folder:
            for image, name in zip(images, names, strict=True):
                to_pil(image).save(folder / f"{name}.png")


def remedy(error: OSError) -> str:
    """Return what a person can do about a file that cannot be written, to end an error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and repeat the command"
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f), or take another disk, and repeat the command"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose another place, or make this one writable"
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP):
        return "choose another place"
    return "look after the disk and repeat the command"


def write_atomically(path: Path, write: Callable[..., Any], **options: Any) -> None:
    """Call ``write(file, **options)`` on a temporary file beside ``path``, then rename it: whole, or not at all.

    Raises:
        PraError: the disk is full or refuses; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                write(file, **options)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, file_mode())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise unwritten(path, error) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill, which appears at ``path`` at the end: whole and on the disk, or not at all.

    Raises:
        PraError: ``path`` exists, or the disk is full or refuses; nothing is left behind.
    """
    partial = partial_folder(path)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in (*partial.iterdir(), partial):
            _sync(file)
        partial.rename(path)
        _sync(path.parent)
    except OSError as error:
        raise unwritten(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Return the folder that holds unfinished work for ``path``, also after a kill."""
    return path.with_name(f".{path.name}.partial")


PLAN = "plan.json"
"""File in an unfinished folder that says what the folder becomes."""


def begin_partial(partial: Path, plan: dict[str, Any], what: str, free: Sequence[str] = ()) -> dict[str, Any]:
    """Begin an unfinished folder, or check that the one that is there was begun in the same way.

    Args:
        partial: the folder (:func:`partial_folder`).
        plan: what it becomes, as JSON values.
        what: the work, for the message: "packing".
        free: keys of the plan whose first value holds.

    Returns:
        The plan at the beginning.

    Raises:
        PraError: it was begun in another way, or the disk refuses.
    """
    path = partial / PLAN
    plan = json.loads(json.dumps(plan))  # as the file gives it back
    if not path.is_file():
        write_atomically(path, lambda file: file.write(json.dumps(plan).encode()))
        return plan
    before: dict[str, Any] = json.loads(path.read_bytes())
    for key, value in plan.items():
        if key not in free and before.get(key) != value:
            raise PraError(
                f"{partial} holds an unfinished {what} with {_shortened(key, before.get(key), value)}; "
                "repeat that command to go on, or remove the folder",
                code="conflict",
                path=partial,
            )
    return before


def _shortened(key: str, before: Any, value: Any) -> str:
    """Return ``"key a, not b"``: of objects the first part that differs, of long values the beginning."""
    if isinstance(before, dict) and isinstance(value, dict):
        part = next(name for name in {**before, **value} if before.get(name) != value.get(name))
        return _shortened(f"{key}.{part}", before.get(part), value.get(part))
    there, here = (repr(v) if len(repr(v)) <= 40 else f"{repr(v)[:40]}..." for v in (before, value))
    return f"{key} {there}, not {here}"


def unwritten(path: Path, error: OSError) -> PraError:
    """Return the error to raise where the disk refuses ``path``."""
    message = f"{path} cannot be written: {error.strerror or error}; nothing was left half-written; {remedy(error)}"
    return PraError(message, code="unwritable", path=path)


def _sync(path: Path) -> None:
    """Flush to the disk; some file systems cannot do that with folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_mode() -> int:
    """Return the permissions of a new file by the process's umask, which temporary files ignore."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
