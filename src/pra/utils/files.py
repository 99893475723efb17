"""Files that appear whole or not at all and never overwrite, ``.npz`` files of others, and the cache."""

from __future__ import annotations

import codecs
import contextlib
import errno
import itertools
import json
import math
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pra.config import differences
from pra.config.checks import fit
from pra.errors import PraError, escaped, reason_of
from pra.utils.pixels import contact_sheet, to_pil, to_uint8

PLAN = "plan.json"
"""File in an unfinished folder that says what the folder becomes."""
MOST_JSON, DEEPEST = 32 * 2**20, 100
"""Bytes of a JSON file, and levels of lists and objects in it. Ours have a name for each class, and ten levels."""
REPAIR = "Repair or replace it"
MOST_ARRAYS = 2**30
"""Bytes of the arrays that are read from an ``.npz`` at once: a small file may promise any number of zeros."""
LONGEST_PART = 100
"""Bytes of a stranger's name in a file's name; most file systems take 255, with numbers and ending."""


def expand(path: str) -> Path:
    """Return a path, ``~`` replaced by the home directory; an unknown user's ``~`` stays."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/pra``, by default in ``~/.cache``."""
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pra"


@contextmanager
def open_regular(path: Path, most: int) -> Iterator[IO[bytes]]:
    """Open a regular file of at most ``most`` bytes: a pipe would not end, nor would a link to ``/dev/zero``.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, at most {most:,}", str(path))
        yield file


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a file as :func:`open_regular` opens it."""
    with open_regular(path, most) as file:
        return file.read(most)


def check_regular(path: Path) -> Path:
    """Return a path for a library to open; anything but a regular file is an ``OSError``."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def unreadable(path: object, problem: str) -> PraError:
    """Return the error of a file that is damaged or of another format."""
    return PraError(f"{path} {problem}", code="unreadable", path=path)


def read_json(path: Path, finite: bool = False, **kinds: Any) -> dict[str, Any]:
    """Read a JSON object from a file, as :func:`parse_json`, and :func:`check_fields` of these ``kinds``."""
    try:
        data = read_regular(path, MOST_JSON)
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name
        raise unreadable(path, f"cannot be read: {reason_of(error)}. {REPAIR}") from None
    return check_fields(parse_json(data, path, finite), path, **kinds)


def parse_json(data: bytes, where: object, finite: bool = False) -> Any:
    """Return the value of a JSON text in UTF-8; ``where`` names it in the error.

    Raises:
        PraError: other text, a nesting beyond :data:`DEEPEST`, or, if ``finite``, a number that is not finite.
    """
    refuse: dict[str, Any] = {"parse_constant": _number, "parse_float": _number} if finite else {}
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
        value, depth = json.loads(text, **refuse), 0
        level = [value] if text.count("[") + text.count("{") > DEEPEST else []
        while level := [part for outer in level if isinstance(outer, dict | list) for part in _parts(outer)]:
            if (depth := depth + 1) > DEEPEST:
                raise RecursionError
    except RecursionError:
        raise unreadable(where, f"is not a JSON file of pra: it nests deeper than {DEEPEST} levels. {REPAIR}") from None
    except ValueError as error:
        reason = "its bytes are not text" if isinstance(error, UnicodeDecodeError) else error
        raise unreadable(where, f"is not JSON: {reason}. {REPAIR}") from None
    return value


def _parts(outer: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def check_fields(values: Any, where: object, /, **kinds: Any) -> dict[str, Any]:
    """Return JSON values if they are an object whose fields have these types (:func:`pra.config.checks.fit`).

    A missing field counts as None. Refuse other values.
    """
    if not isinstance(values, dict):
        raise unreadable(where, f"holds {type(values).__name__} in place of an object. {REPAIR}")
    try:
        for name, kind in kinds.items():
            fit(kind, values.get(name), name)
    except PraError as error:
        raise unreadable(where, f"is damaged: {error}. {REPAIR}") from None
    return values


def own_folder(path: Path) -> Path:
    """Return a folder that files are written into. Refuse a link, which may lead to somebody else's folder."""
    if path.is_symlink():
        problem = "is a link: files would be written elsewhere. Put a folder in its place"
        raise PraError(f"{path} {problem}", code="unwritable", path=path)
    return path


def output_format(path: Path) -> str:
    """Return ``".png"``, ``".npz"``, or ``""`` for a folder such as ``samples-1.5``. Refuse another ending."""
    suffix = path.suffix.lower()
    if suffix in (".png", ".npz"):
        return suffix
    if suffix[1:2].isalpha():
        message = f"{path}: unknown ending {path.suffix!r}. Use FILE.png, FILE.npz or a folder DIR/"
        raise PraError(message, code="unknown", path=path)
    return ""


def check_output(path: Path) -> None:
    """Refuse a path that exists, cannot be written or has no known format, before any work is done."""
    output_format(path)
    check_free(path)


def check_free(path: Path, fix: str = "choose another --out") -> None:
    """Refuse a path that exists or cannot be written; ``fix`` says how to name another.

    A file of the path's name is begun and removed, which finds a full disk and a name that is too long as well.
    """
    if os.path.lexists(path):
        remove = " or remove it" if path.is_file() or path.is_dir() else ""  # not /dev/null
        raise PraError(f"{path} exists already; {fix}{remove}", code="exists", path=path)
    ancestor = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not ancestor.is_dir():
        raise PraError(f"{path} cannot be written: {ancestor} is a file; {fix}", code="unwritable", path=path)
    name = max(path.absolute().relative_to(ancestor).parts, key=lambda part: len(os.fsencode(part)))
    try:
        with tempfile.NamedTemporaryFile(dir=ancestor, prefix=f".{name}.", buffering=0) as file:
            file.write(b"0")
    except OSError as error:
        raise unwritten(path, error) from None


def file_part(text: str) -> str:
    """Return a text as part of a file's name: letters and digits that this file system takes, others as ``-``."""
    known = text.encode(sys.getfilesystemencoding(), "replace").decode(sys.getfilesystemencoding())
    plain = "".join(c if c.isalnum() else "-" for c in known)
    return os.fsencode(plain)[:LONGEST_PART].decode(sys.getfilesystemencoding(), "ignore")


def first_free(path: Path) -> Path:
    """Return ``path``, or the first of ``NAME-2.png``, ``NAME-3.png`` and so on that does not exist."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not os.path.lexists(place))


def save_images(images: Tensor, labels: Sequence[int], names: Sequence[str], columns: int, path: Path) -> None:
    """Write images as the path says: ``FILE.png`` (a contact sheet), ``FILE.npz``, or a folder of PNG files.

    ``images`` are ``(B, C, H, W)`` in [-1, 1] or uint8. ``names`` are of the folder's files, without ending. The npz
    holds ``arr_0`` (uint8 NHWC) and ``arr_1`` (labels), the layout of ADM's evaluator.

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
    """Return the fix for a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and repeat the command"
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f), or take another disk, and repeat the command"
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if error.errno == errno.EIO:
        return "check the disk and repeat the command"
    return "choose another place, or make this one writable"


def write_atomically(path: Path, write: Callable[..., Any], **options: Any) -> None:
    """Call ``write(file, **options)`` on a :func:`new_file`."""
    with new_file(path) as file:
        write(file, **options)


@contextmanager
def new_file(path: Path) -> Iterator[Any]:
    """Yield a file to fill, which appears at ``path`` at the end: whole and on the disk, or not at all.

    A disk that is full or refuses is a PraError; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                yield file
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
    """Yield a folder to fill, which appears at ``path`` at the end: whole and on the disk, or not at all.

    A path that exists, and a disk that is full or refuses, is a PraError; nothing is left behind.
    """
    partial = partial_folder(path)
    if (partial / PLAN).exists():
        problem = f"{partial} holds the unfinished work of another command. Choose another place, or finish that first"
        raise PraError(problem, code="conflict", path=partial)
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
    """Return the folder that holds unfinished work for ``path``, also after a kill. Refuse a link."""
    return own_folder(path.with_name(f".{path.name}.partial"))


def begin_partial(partial: Path, plan: dict[str, Any], what: str, free: Sequence[str] = ()) -> dict[str, Any]:
    """Begin an unfinished folder (:func:`partial_folder`) and return its plan, or the plan with which it was begun.

    ``plan`` is what the folder becomes, as JSON values; ``what`` names the work, such as "packing". Refuse a folder
    whose plan differs, except in the keys ``free``.
    """
    path = partial / PLAN
    plan = json.loads(json.dumps(plan))  # as the file gives it back
    if not os.path.lexists(path):
        write_atomically(path, lambda file: file.write(json.dumps(plan).encode()))
        return plan
    before = read_json(path)
    old, new = ({key: values.get(key) for key in plan if key not in free} for values in (before, plan))
    if changed := differences(old, new, where="there"):
        fix = "Repeat that command to resume it, or remove the folder"
        raise PraError(f"{partial} holds an unfinished {what} ({changed[0][:120]}). {fix}", "conflict", path=partial)
    return before


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


@contextmanager
def explained(path: Path, problem: str, fix: str) -> Iterator[None]:
    """Turn any error of reading a broken file into ``"PATH PROBLEM (reason); FIX"``; a PraError passes unchanged."""
    try:
        check_regular(path)
        yield
    except PraError:
        raise
    except Exception as error:  # on broken bytes zipfile, zlib and numpy raise any exception
        raise PraError(f"{path} {problem} ({reason_of(error)}); {fix}", code="unreadable", path=path) from None


def read_arrays(path: Path, wanted: Collection[str] | None, most: int = MOST_ARRAYS) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays ``wanted`` of an ``.npz``, and an empty array for each other; use it in :func:`explained`.

    None stands for all arrays. Together they have ``most`` bytes at most.
    """
    with np.load(check_regular(path), allow_pickle=False) as file:
        if not hasattr(file, "files"):
            raise ValueError("it holds a single array")
        wanted = file.files if wanted is None else wanted
        size = sum(part.file_size for part in file.zip.infolist() if part.filename.removesuffix(".npy") in wanted)
        if size > most:
            raise ValueError(f"its arrays have {size:,} bytes, at most {most:,}")
        arrays = {name: file[name] if name in wanted else np.empty(0) for name in file.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy returns the bytes of a member that is not an array
            raise ValueError(f"{name} is not an array")
    return arrays


def listed(names: Iterable[str]) -> str:
    """Return the names in a file for a message: ``"mu, sigma"``, or ``"nothing"``."""
    return escaped(", ".join(names))[:200] or "nothing"
