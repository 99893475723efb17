"""What all sources share: decoding, labels, and images held in memory."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pra.errors import PraError, reason_of

Labels = npt.NDArray[np.int64]


class CorruptImage(PraError):  # noqa: N818  reads as what it is, like StopIteration
    """One image that cannot be read, for the reason ``problem``. ``data.on_corrupt`` says what becomes of it."""

    problem = ""


def corrupt(where: str, problem: str) -> CorruptImage:
    """``corrupt("a.png", "cannot be read")``: the error, with its way out."""
    error = CorruptImage(f"{where}: {problem}; replace it, or leave such images out with --set data.on_corrupt=skip")
    error.problem = problem
    return error


def decode(data: bytes, where: str) -> Image.Image:
    """The (first) picture in an encoded file.

    Raises:
        CorruptImage: Pillow cannot read it, or as :func:`check_range`; ``where`` names it in the message.
    """
    with _explained(where):
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
    check_range(image, where)
    return image


def header(path: Path) -> Image.Image:
    """The (first) picture in a file, upright, of which size and mode are known but not yet the pixels.

    Raises:
        CorruptImage: as :func:`decode`, as far as the file's beginning tells.
    """
    with _explained(str(path)), Image.open(path) as image:
        if image.width != image.height:  # a square one is as large, however it is turned
            upright(image)
    check_range(image, str(path))
    return image


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Whatever Pillow raises as :class:`CorruptImage`."""
    try:
        yield
    except UnidentifiedImageError:
        raise corrupt(where, "not an image in any format that Pillow knows") from None
    except Exception as error:  # on broken bytes Pillow's plugins raise whatever they stumble over
        raise corrupt(where, f"cannot be decoded ({reason_of(error)})") from error


def check_range(image: Image.Image, where: str) -> None:
    """Refuses a picture whose levels of black and white nobody knows.

    Raises:
        CorruptImage: its pixels are floating-point numbers.
    """
    if image.mode == "F":
        raise corrupt(where, "floating-point pixels have no known range (save it with 8 or 16 bits)")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; ADM reads ImageNet without, so this is for people's own pictures."""
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def is_image_name(name: str) -> bool:
    """Whether a file's name promises an image: not hidden, and an extension of a format that Pillow opens."""
    return not name.startswith(".") and PurePath(name).suffix.lower() in _extensions()


@functools.cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    return frozenset(extension for extension, kind in known.items() if kind in Image.OPEN)


def pack(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """File names in one block of memory.

    A list of a million strings would be copied into each forked worker, page by page, as their reference
    counts change.
    """
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


MOST_CLASSES = 100_000
"""Fewer classes than this may be numbers without names: more are identifiers, taken for classes by mistake."""


def numbered_classes(labels: Labels, where: Callable[[int], str], way_out: str) -> list[str]:
    """Names for classes that have none: their numbers.

    Args:
        labels: of all images, 0 or more.
        where: names the place of a label, by its index, for the message.
        way_out: what a person may do instead, likewise.

    Raises:
        PraError: the highest is no class's number.
    """
    worst = int(labels.argmax())
    highest = int(labels[worst])
    if highest >= MOST_CLASSES:
        raise PraError(
            f"{where(worst)} has class {highest}; classes without names are numbers below {MOST_CLASSES}: {way_out}"
        )
    return [str(label) for label in range(highest + 1)]


class ArraySource:
    """Images held in memory: ``images`` is uint8, ``(N, H, W)`` for grey ones and ``(N, H, W, 3)`` for colour."""

    def __init__(self, name: str, images: npt.NDArray[np.uint8], labels: Labels, classes: tuple[str, ...]) -> None:
        self.name = name
        self.classes = classes
        self.labels = labels
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> Image.Image:
        """One image, mode "L" or "RGB"."""
        return Image.fromarray(self._images[index])

    def where(self, index: int) -> str:
        """``"image 17 of digits"``."""
        return f"image {index} of {self.name}"
