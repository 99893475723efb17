"""Images inside tar files: their places are found once, kept in an index, and read in any order afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from pra.data.images import Labels, corrupt, decode
from pra.errors import PraError
from pra.utils.paths import cache_folder

_FORMAT = 2
_OPEN_FILES = 128
"""At once in each process: many systems allow 1024."""


@dataclass(frozen=True)
class TarIndex:
    """Where each image lies: arrays ``(N,)``, except ``classes``, the classes' names in the order of their labels.

    ``files`` says in which tar, ``offsets`` and ``sizes`` (bytes) where in it, ``members`` are the files' names.
    """

    files: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: Labels
    members: npt.NDArray[np.bytes_]
    classes: npt.NDArray[np.str_]


class TarFiles:
    """Tars that are read at any place, from any process: neither a forked nor a spawned one shares its parent's files.

    The files read last stay open.
    """

    _process = 0

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def read(self, index: TarIndex, number: int) -> bytes:
        """Image ``number`` of the index; shorter than it was where the file has been cut since.

        Raises:
            OSError: the file is gone, or cannot be read.
        """
        descriptor = self._descriptor(int(index.files[number]))
        return os.pread(descriptor, int(index.sizes[number]), int(index.offsets[number]))

    def _descriptor(self, file: int) -> int:
        if self._process != os.getpid():
            self._open: OrderedDict[int, int] = OrderedDict()
            self._process = os.getpid()
        if file not in self._open:
            self._open[file] = os.open(self.paths[file], os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        return self._open[file]

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths}

    def __del__(self) -> None:
        if self._process == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)


# --- the index ----------------------------------------------------------------------------------------------


class TarSource:
    """A source of the images of tars, in the order of the tars and of their members (:class:`pra.data.Source`)."""

    def __init__(self, name: str, tars: Sequence[Path], index: TarIndex) -> None:
        self._files, self._index = TarFiles(tars), index
        self.name = name
        self.classes = tuple(str(class_name) for class_name in index.classes)
        self.labels = index.labels

    def __len__(self) -> int:
        return len(self._index.offsets)

    def encoded(self, index: int) -> bytes:
        try:
            return self._files.read(self._index, index)
        except OSError as error:
            raise corrupt(self.where(index), f"cannot be read ({error.strerror})") from error

    def image(self, index: int) -> Image.Image:
        """One image, in its own size and mode.

        Raises:
            CorruptImage: it cannot be decoded, or its tar is gone.
        """
        return decode(self.encoded(index), self.where(index))

    def where(self, index: int) -> str:
        """``"00000017.jpg in DIR/shard-000000.tar"``."""
        member = os.fsdecode(bytes(self._index.members[index]))
        return f"{member} in {self._files.paths[self._index.files[index]]}"


def load_index(tars: Sequence[Path], scan: Callable[[], TarIndex], beside: Sequence[Path] = ()) -> TarIndex:
    """The saved index, as long as sizes and times of modification of the tars are what they were; else a new one.

    It is kept beside the first tar, or in ``$XDG_CACHE_HOME/pra`` where that cannot be written.

    Args:
        tars: at least one.
        scan: makes the index.
        beside: other files that it depends on.

    Raises:
        PraError: as ``scan``.
    """
    files = (*tars, *beside)
    stamp, places = _stamp(files), _places(tars)
    for place in places:
        # Whatever is wrong with a saved index, a new one mends it.
        with contextlib.suppress(Exception), place.open("rb") as file:
            saved = np.load(file, allow_pickle=False)
            if saved["stamp"].tolist() == stamp:
                return TarIndex(**{field.name: saved[field.name] for field in fields(TarIndex)})
    index = scan()
    for place in places:
        try:
            # The stamp of before the scan: a tar that changes meanwhile must not match.
            _save(index, place, stamp)
            return index
        except OSError as error:
            problem = f"{place}: {error.strerror}"
    warnings.warn(f"the index of {tars[0]} cannot be saved ({problem}); it will be made again", stacklevel=2)
    return index


def _places(tars: Sequence[Path]) -> tuple[Path, Path]:
    """Beside the first tar, and in the user's cache."""
    digest = hashlib.sha256(b"\0".join(os.fsencode(path.absolute()) for path in tars)).hexdigest()[:16]
    name = tars[0].name
    local = f"{name}.index.npz" if len(tars) == 1 else f"{name}.{digest}.index.npz"
    return tars[0].with_name(local), cache_folder() / f"{name}.{digest}.index.npz"


def _stamp(paths: Sequence[Path]) -> list[int]:
    stamp = [_FORMAT]
    for path in paths:
        status = path.stat()
        stamp += [status.st_size, status.st_mtime_ns]
    return stamp


def _save(index: TarIndex, place: Path, stamp: list[int]) -> None:
    """Write the whole file under another name first, so that nobody ever reads half an index."""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez(file, stamp=np.array(stamp), **{f.name: getattr(index, f.name) for f in fields(index)})
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)


# --- reading headers ----------------------------------------------------------------------------------------


def open_tar(file: IO[bytes] | None, where: str, remedy: str) -> tarfile.TarFile:
    """A tar to be read.

    Raises:
        PraError: it is compressed, or none; ``remedy`` says what to do.
    """
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise PraError(f"{where} is not an uncompressed tar ({error}); {remedy}") from error


def members(tar: tarfile.TarFile, size: int, where: str) -> Iterator[tarfile.TarInfo]:
    """The regular files in a tar of ``size`` bytes.

    Raises:
        PraError: a member that does not fit, a broken header, or no block of zeros at the end. ``tarfile``
            takes the last two for the end of the archive where earlier headers were good.
    """
    assert tar.fileobj is not None
    try:
        for member in tar:
            if member.offset_data + member.size > size:
                raise _damaged(where, size)
            if member.isreg():
                yield member
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise _damaged(where, tar.offset) from error
    if end != bytes(tarfile.BLOCKSIZE):
        raise _damaged(where, tar.offset)


def _damaged(where: str, place: int) -> PraError:
    return PraError(f"{where} is truncated or damaged at byte {place}; download it again")
