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
    """``".png"``, ``".npz"``, or ``""`` for a folder; ``samples-1.5`` has none.

    Raises:
        PraError: an ending that says no known format.
    """
    suffix = path.suffix.lower()
    if suffix in (".png", ".npz"):
        return suffix
    if suffix[1:2].isalpha():
        raise PraError(f"{path}: unknown ending {path.suffix!r}; use FILE.png, FILE.npz or a folder DIR/")
    return ""


def check_output(path: Path) -> None:
    """Refuses what would overwrite, or what cannot be written, before any work is done.

    Raises:
        PraError: the path exists, it cannot be made where it is to lie, or its ending says no format.
    """
    output_format(path)
    check_free(path)


def check_free(path: Path, way_out: str = "choose another --out") -> None:
    """:func:`check_output` for a file or folder of any ending.

    Args:
        path: the file or folder.
        way_out: how another one is named, for the message.

    Raises:
        PraError: the path exists, or it cannot be made where it is to lie.
    """
    if os.path.lexists(path):
        raise PraError(f"{path} exists already; {way_out} or remove it")
    ancestor = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        problem = "cannot be written to" if ancestor.is_dir() else "is a file"
        raise PraError(f"{path} cannot be written: {ancestor} {problem}; {way_out}")


def first_free(path: Path) -> Path:
    """``path``, or the first of ``NAME-2.png``, ``NAME-3.png`` and so on that is not there yet."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not os.path.lexists(place))


def save_images(images: Tensor, labels: Sequence[int], names: Sequence[str], columns: int, path: Path) -> None:
    """Writes images by the path's ending: one PNG (a grid, or the image where there is one), an npz, or a folder.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1], or uint8.
        labels: one per image.
        names: file names without ending, one per image, all different; for a folder.
        columns: of the grid.
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
    """What a person can do about a file that cannot be written, to be appended to an error."""
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
    """``write(file, **options)`` into a temporary file beside ``path``, then a rename: whole, or not at all.

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
    """A folder to fill with files, which appears at ``path`` at the end: whole and on the disk, or not at all.

    Raises:
        PraError: something is there already, or the disk is full or refuses; nothing is left behind.
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
    """Where work lies that outlives a kill, until it has its name."""
    return path.with_name(f".{path.name}.partial")


PLAN = "plan.json"
"""What an unfinished folder is to become."""


def begin_partial(partial: Path, plan: dict[str, Any], what: str, free: Sequence[str] = ()) -> dict[str, Any]:
    """Begins an unfinished folder, or makes sure that what lies there was begun in the same way.

    Args:
        partial: the folder (:func:`partial_folder`).
        plan: what it is to become, as JSON values.
        what: of what it is, for the message: "packing".
        free: keys of the plan that need not agree: what the beginning says holds.

    Returns:
        The plan of the beginning.

    Raises:
        PraError: it was begun in another way, or the disk refuses.
    """
    path = partial / PLAN
    plan = json.loads(json.dumps(plan))  # as it will be read
    if not path.is_file():
        write_atomically(path, lambda file: file.write(json.dumps(plan).encode()))
        return plan
    before: dict[str, Any] = json.loads(path.read_bytes())
    for key, value in plan.items():
        if key not in free and before.get(key) != value:
            raise PraError(
                f"{partial} holds an unfinished {what} with {_shortened(key, before.get(key), value)}; "
                "repeat that command to go on, or remove the folder"
            )
    return before


def _shortened(key: str, before: Any, value: Any) -> str:
    """``"key a, not b"`` for a message: of objects the first part that differs, of what is long its beginning."""
    if isinstance(before, dict) and isinstance(value, dict):
        part = next(name for name in {**before, **value} if before.get(name) != value.get(name))
        return _shortened(f"{key}.{part}", before.get(part), value.get(part))
    there, here = (repr(v) if len(repr(v)) <= 40 else f"{repr(v)[:40]}..." for v in (before, value))
    return f"{key} {there}, not {here}"


def unwritten(path: Path, error: OSError) -> PraError:
    """The error to raise where the disk refuses ``path``."""
    reason = error.strerror or error
    return PraError(f"{path} cannot be written: {reason}; nothing was left half-written; {remedy(error)}")


def _sync(path: Path) -> None:
    """To the disk; some file systems do not do that with folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_mode() -> int:
    """The permissions of a new file by the process's mask, which a temporary one does not follow."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
