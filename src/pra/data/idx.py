"""The IDX files of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist), gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pra.data.images import ArraySource
from pra.errors import PraError

_FASHION = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


def open_idx(name: str, folder: Path, test: bool) -> ArraySource:
    """Images and labels of one split, read into memory.

    The files do not name the classes: they are Fashion-MNIST's where the folder's name contains "fashion",
    and numbers otherwise.

    Raises:
        PraError: the folder or a file is missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise PraError(f"data source {name!r}: {folder} is not a folder; give the folder with the IDX files")
    split = "t10k" if test else "train"
    images_file = _find(folder, f"{split}-images-idx3-ubyte")
    labels_file = _find(folder, f"{split}-labels-idx1-ubyte")
    images, labels = _read(images_file, dimensions=3), _read(labels_file, dimensions=1)
    if len(images) != len(labels):
        raise PraError(
            f"{images_file} holds {len(images)} images but {labels_file} {len(labels)} labels; "
            "they must come from the same data set"
        )
    return ArraySource(name, images, labels.astype(np.int64), _class_names(folder, int(labels.max()) + 1))


def _class_names(folder: Path, count: int) -> tuple[str, ...]:
    # The absolute path, so that "idx:." has a name, yet unresolved: a link called "fashion" says enough.
    named = "fashion" in folder.absolute().name.lower()
    return tuple(_FASHION) if named and count <= 10 else tuple(str(label) for label in range(count))


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise PraError(f"{folder} holds neither {stem} nor {stem}.gz; download the data set's IDX files into it")


def _read(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """A file's array of unsigned bytes, checked against its header: a magic number, then the shape."""
    data = _bytes(path)
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if len(data) < header or data[:4] != magic:
        raise PraError(
            f"{path} is not an IDX file of {dimensions} dimension(s): it begins with {data[:4].hex()!r} "
            f"instead of {magic.hex()!r}; download it again"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    promised, found = int(np.prod(shape, dtype=object)), len(data) - header
    if promised != found:
        raise PraError(f"{path} is damaged: its header promises {promised} bytes and {found} follow; download it again")
    if not found:
        raise PraError(f"{path} is empty: its header promises no data; download it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PraError(f"{path} is truncated or damaged ({error}); download it again") from error
