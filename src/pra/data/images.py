"""The parts that all sources share: decoding, labels, and images held in memory."""

from __future__ import annotations

import contextlib
import functools
import io
import mimetypes
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pra.errors import PraError, reason_of

Labels = npt.NDArray[np.int64]

MOST_CLASSES = 100_000
"""Classes without names are numbers below this: higher ones are identifiers, taken for classes by mistake."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
"""Pillow's names of the formats that are read, as far as this Pillow has them. For EPS it would start Ghostscript."""


class CorruptImage(PraError):  # noqa: N818  reads as what it is, like StopIteration
    """One image that cannot be read, because of ``problem``; ``data.on_corrupt`` decides what happens next."""

    problem = ""


def corrupt(where: str, problem: str) -> CorruptImage:
    """Return the error for the image at ``where``."""
    message = f"{where}: {problem}. Replace it, or leave such images out with --set data.on_corrupt=skip"
    error = CorruptImage(message, "unreadable", where=where)
    error.problem = problem
    return error


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open a picture of one of :data:`FORMATS` as far as its header; Pillow's other formats may start programs."""
    Image.init()
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(data: bytes, where: str) -> Image.Image:
    """Return the (first) picture in an encoded file, or raise CorruptImage; ``where`` names it in the message."""
    with _explained(where):
        image = open_image(io.BytesIO(data))
        image.load()
    check_range(image, where)
    return image


def header(path: Path) -> Image.Image:
    """Return the (first) picture in a file, upright, with its size and mode but not yet its pixels."""
    with _explained(str(path)), open_image(path) as image:
        if image.width != image.height:  # turning a square does not change its size
            upright(image)
    check_range(image, str(path))
    return image


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError:
        raise corrupt(where, f"not an image in any format that is read here ({', '.join(FORMATS)})") from None
    except Exception as error:  # on broken bytes Pillow's plugins raise any exception
        raise corrupt(where, f"cannot be decoded ({reason_of(error)})") from error


def check_range(image: Image.Image, where: str) -> None:
    """Refuse a picture whose levels of black and white are unknown, as CorruptImage."""
    if image.mode == "F":
        raise corrupt(where, "floating-point pixels have no known range (save it with 8 or 16 bits)")


def upright(image: Image.Image) -> Image.Image:
    """Turn a picture in place as its EXIF orientation says, and return it. ADM reads ImageNet without."""
    with contextlib.suppress(Exception):  # a broken EXIF block does not affect the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def is_image_name(name: str) -> bool:
    """Return whether a file is not hidden and has the extension of a format that can be read."""
    kind = Image.registered_extensions().get(PurePath(name).suffix.lower())
    return not name.startswith(".") and kind in FORMATS and kind in Image.OPEN


def is_picture_name(name: str) -> bool:
    """Return whether a file has the extension of a picture, of a format that can be read or of another."""
    known = PurePath(name).suffix.lower() in Image.registered_extensions()
    return known or str(mimetypes.guess_type(name, strict=False)[0]).startswith("image/")


@functools.cache
def warn_once(text: str) -> None:
    """Warn about data: once, as a training opens its source more than once, and on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(text, stacklevel=3)


def pack(names: Iterable[str]) -> npt.NDArray[np.bytes_]:
    """Return file names in one block: reference counts would copy a list of strings into each forked worker."""
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def numbered_classes(labels: Labels, where: Callable[[int], str], fix: str) -> list[str]:
    """Return numbers as names for classes that have none, below :data:`MOST_CLASSES`; ``where`` names an image."""
    highest = int(labels.max())
    if highest >= MOST_CLASSES:
        problem = f"{where(int(labels.argmax()))}: class {highest} has no name and is not below {MOST_CLASSES}"
        raise PraError(f"{problem}. {fix}", value=highest)
    return [str(label) for label in range(highest + 1)]


def check_there(path: Path, what: str, fix: str) -> None:
    """Refuse a path that is not a ``what``, "file" or "folder"."""
    if not (path.is_dir() if what == "folder" else path.is_file()):
        problem = f"is not a {what}" if path.exists() else "does not exist"
        raise PraError(f"{path} {problem}. {fix}", "missing", path=path)


class Labelled:
    """The base of all sources: a name, the classes' names, and a label (int64) per image."""

    def __init__(self, name: str, classes: Iterable[str], labels: Labels) -> None:
        self.name, self.classes, self.labels = name, tuple(str(class_name) for class_name in classes), labels

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"


class Files(Labelled):
    """The base of sources whose images are encoded files. ``turned``: as their EXIF orientation says."""

    turned = True

    def encoded(self, index: int) -> bytes:
        raise NotImplementedError

    def image(self, index: int) -> Image.Image:
        image = decode(self.encoded(index), self.where(index))
        return upright(image) if self.turned else image


class ArraySource(Labelled):
    """Images held in memory: ``images`` is uint8, ``(N, H, W)`` for grey and ``(N, H, W, 3)`` for colour."""

    def __init__(self, name: str, images: npt.NDArray[np.uint8], labels: Labels, classes: tuple[str, ...]) -> None:
        super().__init__(name, classes, labels)
        self._images = images

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])
