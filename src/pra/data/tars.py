"""Images inside tar files: found once, kept in an index, and read in any order afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from pra.data.images import Files, Labels, check_there, corrupt, is_image_name, pack
from pra.errors import PraError
from pra.utils.files import cache_folder, write_atomically
from pra.utils.progress import Progress

_FORMAT = 2
OPEN_FILES = 128
"""Tars open at once in each process: many systems allow 1024 files."""
_IMAGENET = "Give ILSVRC2012_img_train.tar as downloaded"


class Found(NamedTuple):
    """One image in a tar: the tar's number, offset and size in bytes, the file's name, and its label."""

    file: int
    offset: int
    size: int
    member: str
    label: int


@dataclass(frozen=True)
class TarIndex:
    """Columns of :class:`Found`, ``(N,)``, and the classes' names in the order of their labels."""

    files: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: Labels
    members: npt.NDArray[np.bytes_]
    classes: npt.NDArray[np.str_]

    @classmethod
    def of(cls, found: Iterable[Found], classes: Sequence[str]) -> TarIndex:
        """Collect at least one image."""
        files, offsets, sizes, members, labels = zip(*found, strict=True)
        places = np.array(files, np.int32), np.array(offsets), np.array(sizes)
        return cls(*places, np.array(labels, np.int64), pack(members), np.array(classes))


class TarSource(Files):
    """The images of tars, in the order of the tars and of their members. EXIF orientation is ignored."""

    turned = False

    def __init__(self, name: str, tars: Sequence[Path], index: TarIndex) -> None:
        super().__init__(name, index.classes, index.labels)
        self._tars, self._index = tuple(tars), index
        self._open: dict[int, FileIO] = {}

    def encoded(self, index: int) -> bytes:
        file = int(self._index.files[index])
        try:
            opened = self._open.pop(file, None)
            if opened is None:
                if len(self._open) >= OPEN_FILES:
                    self._open.pop(next(iter(self._open))).close()
                opened = FileIO(self._tars[file])
            self._open[file] = opened  # last: the first file in the cache is the least recently used
            # Forked workers share open files and their positions: pread ignores the position.
            return os.pread(opened.fileno(), int(self._index.sizes[index]), int(self._index.offsets[index]))
        except OSError as error:
            raise corrupt(self.where(index), f"cannot be read ({error.strerror})") from error

    def where(self, index: int) -> str:
        return f"{os.fsdecode(bytes(self._index.members[index]))} in {self._tars[self._index.files[index]]}"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}


class ImageNetTar(TarSource):
    """``ILSVRC2012_img_train.tar`` as downloaded: a tar with one inner tar of JPEG files per class.

    Images come in the order of the tar; classes are the inner tars' names (wnids), sorted.
    """

    def __init__(self, name: str, path: Path) -> None:
        check_there(path, "file", _IMAGENET)
        super().__init__(name, [path], load_index([path], lambda: _scan(path)))

    def where(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{super().where(index)}"


def _scan(path: Path) -> TarIndex:
    size = path.stat().st_size
    by_class: list[tuple[str, Found]] = []
    bar = Progress(desc=f"indexing {path.name}", total=size, unit="B", unit_scale=True)
    with path.open("rb") as file, bar:
        for outer, inner in members(file, size, str(path), _IMAGENET):
            if PurePosixPath(inner.name).match("[!.]*.tar"):
                images = members(outer.extractfile(inner), inner.size, f"{inner.name} in {path}", _IMAGENET)
                for _, member in images:
                    name = PurePosixPath(member.name).name
                    if is_image_name(name):
                        found = Found(0, inner.offset_data + member.offset_data, member.size, name, 0)
                        by_class.append((PurePosixPath(inner.name).stem, found))
            bar.update(inner.offset_data + inner.size - bar.n)
    if not by_class:
        raise PraError(f"{path} holds no class tars with images. {_IMAGENET}, or use folder:", "unreadable", path=path)
    classes = sorted({wnid for wnid, _ in by_class})
    labels = {wnid: label for label, wnid in enumerate(classes)}
    return TarIndex.of((found._replace(label=labels[wnid]) for wnid, found in by_class), classes)


def load_index(tars: Sequence[Path], scan: Callable[[], TarIndex], beside: Sequence[Path] = ()) -> TarIndex:
    """Return the saved index while sizes and times of ``tars`` and ``beside`` stay, and a new one otherwise.

    It is kept beside the first tar, or in ``$XDG_CACHE_HOME/pra`` if that cannot be written.
    """
    status = [path.stat() for path in (*tars, *beside)]
    # Taken before the scan: a tar that changes meanwhile must not match.
    stamp = [_FORMAT, *(number for s in status for number in (s.st_size, s.st_mtime_ns))]
    digest = hashlib.sha256(b"\0".join(os.fsencode(path.absolute()) for path in tars)).hexdigest()[:16]
    name, long_name = (f"{tars[0].name}{part}.index.npz" for part in ("", f".{digest}"))
    places = tars[0].with_name(name if len(tars) == 1 else long_name), cache_folder() / long_name
    for place in places:
        # A new index replaces a damaged one.
        with contextlib.suppress(Exception), np.load(place, allow_pickle=False) as saved:
            if saved["stamp"].tolist() == stamp:
                return TarIndex(**{column: saved[column] for column in TarIndex.__annotations__})
    index = scan()
    for place in places:
        try:
            write_atomically(place, lambda file: np.savez(file, stamp=np.array(stamp), **asdict(index)))
            return index
        except PraError as error:
            problem = error
    warnings.warn(f"the index of {tars[0]} will be made again each time: {problem}", stacklevel=2)
    return index


def members(
    file: IO[bytes] | None, size: int, where: str, fix: str
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield an uncompressed tar of ``size`` bytes and each regular file in it.

    Refuse other files, and what ``tarfile`` takes for the end: a broken header, or a missing block of zeros.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            assert tar.fileobj is not None
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"truncated at byte {size}")
                if member.isreg():
                    yield tar, member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        raise PraError(f"{where} is not a whole, uncompressed tar: {error}. {fix}", "unreadable", path=where) from error
