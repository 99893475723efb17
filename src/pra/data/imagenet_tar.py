"""``ILSVRC2012_img_train.tar`` as downloaded: a tar with one inner tar of JPEG files per class."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from pra.data.images import Labels, corrupt, decode, expand, is_image_name, pack
from pra.errors import PraError

_FORMAT = 1


@dataclass(frozen=True)
class _Index:
    """Where each image lies in the outer tar: arrays ``(N,)``, except ``wnids``, the sorted class names."""

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: Labels
    members: npt.NDArray[np.bytes_]
    wnids: npt.NDArray[np.str_]


class ImageNetTar:
    """The images of the tar, in its order; classes are the inner tars' names (wnids), sorted. Never unpacked.

    The first opening reads all headers and keeps an index beside the tar, or in ``$XDG_CACHE_HOME/pra`` where
    that cannot be written. It is used again while the tar's size and time of modification stay the same.
    """

    _process = 0

    def __init__(self, name: str, path: Path) -> None:
        """Load the index, or build and save it.

        Raises:
            PraError: no such file, not a tar of tars, truncated or damaged.
        """
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise PraError(f"data source {name!r}: {path} {problem}; give ILSVRC2012_img_train.tar as downloaded")
        self._path = path
        self._index = _saved_index(path) or _new_index(path)
        self.name = name
        self.classes = tuple(str(wnid) for wnid in self._index.wnids)
        self.labels = self._index.labels

    def __len__(self) -> int:
        return len(self._index.offsets)

    def image(self, index: int) -> Image.Image:
        """One image, upright, in its own size and mode.

        Raises:
            CorruptImage: it cannot be decoded, or the tar is gone.
        """
        offset, size = int(self._index.offsets[index]), int(self._index.sizes[index])
        try:
            data = os.pread(self._descriptor(), size, offset)
        except OSError as error:
            raise corrupt(self.where(index), f"cannot be read ({error.strerror})") from error
        return decode(data, self.where(index))

    def where(self, index: int) -> str:
        """``"n01440764/n01440764_18.JPEG in train.tar"``."""
        member = os.fsdecode(bytes(self._index.members[index]))
        return f"{self.classes[self.labels[index]]}/{member} in {self._path}"

    def _descriptor(self) -> int:
        """This process's own: neither a forked nor a spawned worker shares its parent's."""
        if self._process != os.getpid():
            self._file = os.open(self._path, os.O_RDONLY)
            self._process = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_file", "_process")}

    def __del__(self) -> None:
        if self._process == os.getpid():
            os.close(self._file)


# --- the index ----------------------------------------------------------------------------------------------


def _saved_index(path: Path) -> _Index | None:
    """The saved index, unless there is none that belongs to the tar as it is now."""
    for place in _places(path):
        # Whatever is wrong with a saved index, a new one mends it.
        with contextlib.suppress(Exception), place.open("rb") as file:
            saved = np.load(file, allow_pickle=False)
            if saved["stamp"].tolist() == _stamp(path):
                return _Index(**{field.name: saved[field.name] for field in fields(_Index)})
    return None


def _new_index(path: Path) -> _Index:
    stamp = _stamp(path)  # before the scan: a tar that changes meanwhile must not match
    index = _scan(path)
    for place in _places(path):
        try:
            _save(index, place, stamp)
            return index
        except OSError as error:
            problem = f"{place}: {error.strerror}"
    warnings.warn(f"the index of {path} cannot be saved ({problem}); it will be made again", stacklevel=2)
    return index


def _places(path: Path) -> tuple[Path, Path]:
    """Beside the tar, and in the user's cache."""
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    cache = expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return path.with_name(f"{path.name}.index.npz"), cache / "pra" / f"{path.name}.{digest}.index.npz"


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [_FORMAT, status.st_size, status.st_mtime_ns]


def _save(index: _Index, place: Path, stamp: list[int]) -> None:
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


def _scan(path: Path) -> _Index:
    size = path.stat().st_size
    found: list[tuple[int, int, str, str]] = []
    with (
        path.open("rb") as file,
        tqdm(desc=f"indexing {path.name}", total=size, unit="B", unit_scale=True) as bar,
        _tar(file, str(path)) as outer,
    ):
        for inner in _members(outer, size, str(path)):
            if PurePosixPath(inner.name).match("[!.]*.tar"):
                found += _images_in(outer, inner, f"{inner.name} in {path}")
            bar.update(inner.offset_data + inner.size - bar.n)
    if not found:
        raise PraError(
            f"{path} holds no class tars with images (n01440764.tar, ...); "
            "give ILSVRC2012_img_train.tar as downloaded, or unpack this one and use folder:PATH"
        )
    offsets, sizes, names, wnids = zip(*found, strict=True)
    classes, labels = np.unique(np.array(wnids), return_inverse=True)
    return _Index(np.array(offsets), np.array(sizes), labels.astype(np.int64), pack(names), classes)


def _images_in(outer: tarfile.TarFile, inner: tarfile.TarInfo, where: str) -> Iterator[tuple[int, int, str, str]]:
    """(offset in the outer tar, size, file name, wnid) of each image in one inner tar."""
    wnid = PurePosixPath(inner.name).stem
    with _tar(outer.extractfile(inner), where) as images:
        for member in _members(images, inner.size, where):
            name = PurePosixPath(member.name).name
            if is_image_name(name):
                yield inner.offset_data + member.offset_data, member.size, name, wnid


def _tar(file: IO[bytes] | None, where: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.TarError as error:
        raise PraError(
            f"{where} is not an uncompressed tar ({error}); give ILSVRC2012_img_train.tar as downloaded"
        ) from error


def _members(tar: tarfile.TarFile, size: int, where: str) -> Iterator[tarfile.TarInfo]:
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
