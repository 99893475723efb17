"""Small data sets held in memory: scikit-learn's digits, and the IDX files of MNIST, gzipped or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pra.data.images import ArraySource, check_there
from pra.errors import PraError

_FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


MOST_BYTES = 4 * 2**30
"""Pixels of one file, which are held in memory."""


def open_digits(name: str, test: bool) -> ArraySource:
    """Open one split of 1797 grey digits of 8x8: every sixth is for testing. Values 0..16 become 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 6 == 5) == test
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(name, images, data.target[chosen].astype(np.int64), tuple("0123456789"))


def open_idx(name: str, folder: Path, test: bool) -> ArraySource:
    """Read one split into memory; classes are Fashion-MNIST's if the folder's name says so, and numbers otherwise."""
    check_there(folder, "folder", "Give the folder with the IDX files")
    split = "t10k" if test else "train"
    images_file = _find(folder, f"{split}-images-idx3-ubyte")
    labels_file = _find(folder, f"{split}-labels-idx1-ubyte")
    images, labels = _read(images_file, dimensions=3), _read(labels_file, dimensions=1)
    if len(images) != len(labels):
        problem = f"it holds {len(images)} images, but {labels_file.name} {len(labels)} labels"
        raise PraError(f"{images_file}: {problem}. Take both from one data set", "mismatch", path=images_file)
    count = int(labels.max()) + 1
    # The absolute path has a name for "idx:.", and is unresolved: a link called "fashion" counts.
    fashion = "fashion" in folder.absolute().name.lower() and count <= len(_FASHION)
    classes = _FASHION if fashion else tuple(str(label) for label in range(count))
    return ArraySource(name, images, labels.astype(np.int64), classes)


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise PraError(f"{folder} lacks {stem} and {stem}.gz. Download them into it", "missing", path=folder)


def _read(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Return a file's unsigned bytes, checked against its header: a magic number, then the shape."""
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != magic:
                raise _damaged(path, f"not an IDX file: it begins with {header[:4].hex()!r}, not with {magic.hex()!r}")
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4", offset=4))
            promised = int(np.prod(shape, dtype=object))
            if promised > MOST_BYTES:
                raise _damaged(path, f"the header promises {promised} bytes, the most is {MOST_BYTES}")
            data = file.read(promised + 1)  # no more: a small .gz may hold any number of zeros
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, f"truncated or damaged ({error})") from error
    if promised != len(data) or not data:
        found = f"{len(data)}" if len(data) <= promised else "more"
        raise _damaged(path, f"damaged: the header promises {promised} bytes and {found} follow")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _damaged(path: Path, problem: str) -> PraError:
    return PraError(f"{path}: {problem}. Download it again", "unreadable", path=path)
