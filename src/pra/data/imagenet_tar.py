"""``ILSVRC2012_img_train.tar`` as downloaded: a tar with one inner tar of JPEG files per class."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from pra.data.images import is_image_name, pack
from pra.data.tars import TarIndex, TarSource, load_index, members, open_tar
from pra.errors import PraError
from pra.utils.progress import Progress

_AS_DOWNLOADED = "give ILSVRC2012_img_train.tar as downloaded"


class ImageNetTar(TarSource):
    """The images of the tar, in its order; classes are the inner tars' names (wnids), sorted. Never unpacked.

    The first opening reads all headers and keeps an index (see :func:`pra.data.tars.load_index`).
    """

    def __init__(self, name: str, path: Path) -> None:
        """Load the index, or build and save it.

        Raises:
            PraError: no such file, not a tar of tars, truncated or damaged.
        """
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise PraError(f"data source {name!r}: {path} {problem}; {_AS_DOWNLOADED}")
        super().__init__(name, [path], load_index([path], lambda: _scan(path)))

    def where(self, index: int) -> str:
        """``"n01440764/n01440764_18.JPEG in train.tar"``."""
        return f"{self.classes[self.labels[index]]}/{super().where(index)}"


def _scan(path: Path) -> TarIndex:
    size = path.stat().st_size
    found: list[tuple[int, int, str, str]] = []
    with (
        path.open("rb") as file,
        Progress(desc=f"indexing {path.name}", total=size, unit="B", unit_scale=True) as bar,
        open_tar(file, str(path), _AS_DOWNLOADED) as outer,
    ):
        for inner in members(outer, size, str(path)):
            if PurePosixPath(inner.name).match("[!.]*.tar"):
                found += _images_in(outer, inner, f"{inner.name} in {path}")
            bar.update(inner.offset_data + inner.size - bar.n)
    if not found:
        raise PraError(
            f"{path} holds no class tars with images (n01440764.tar, ...); "
            f"{_AS_DOWNLOADED}, or unpack this one and use folder:PATH"
        )
    offsets, sizes, names, wnids = zip(*found, strict=True)
    classes, labels = np.unique(np.array(wnids), return_inverse=True)
    files = np.zeros(len(found), np.int32)
    return TarIndex(files, np.array(offsets), np.array(sizes), labels.astype(np.int64), pack(names), classes)


def _images_in(outer: tarfile.TarFile, inner: tarfile.TarInfo, where: str) -> Iterator[tuple[int, int, str, str]]:
    """(offset in the outer tar, size, file name, wnid) of each image in one inner tar."""
    wnid = PurePosixPath(inner.name).stem
    with open_tar(outer.extractfile(inner), where, _AS_DOWNLOADED) as images:
        for member in members(images, inner.size, where):
            name = PurePosixPath(member.name).name
            if is_image_name(name):
                yield inner.offset_data + member.offset_data, member.size, name, wnid
