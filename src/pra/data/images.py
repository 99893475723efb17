"""The parts that all sources share: decoding, labels, and images held in memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import mimetypes
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pra.errors import Code, PraError, reason_of
from pra.utils.distributed import variable

Labels = npt.NDArray[np.int64]

MOST_CLASSES = 100_000
"""Classes without names are numbers below this: higher ones are identifiers, taken for classes by mistake."""


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
"""Pillow's names of the formats that are read, if this Pillow has them. For EPS it would start Ghostscript."""

MOST_PIXELS, MOST_ASPECT = 64_000_000, 100
"""Limits of a picture: its pixels, and how many times as narrow it may be as the crop.

``PRA_MAX_PIXELS`` and ``PRA_MAX_ASPECT`` in the environment replace them.
"""
_MORE_PIXELS, _LARGER = "PRA_MAX_PIXELS allows more", "Unset it, or give a larger number"
_TO_ESCAPE = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff]")
"""Control characters, ends of lines, and what UTF-8 cannot hold."""

# check_size refuses such pictures.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class CorruptImage(PraError):  # noqa: N818  reads as what it is, like StopIteration
    """One image that cannot be read, because of ``problem``; ``data.on_corrupt`` decides what happens next."""

    problem = ""
    setting = "on_corrupt"


def corrupt(where: str, problem: str, code: Code = "unreadable") -> CorruptImage:
    """Return the error for the image at ``where``."""
    message = f"{where}: {problem}. Replace it, or leave such images out with --set data.on_corrupt=skip"
    error = CorruptImage(message, code, where=where)
    error.problem = problem
    return error


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open a picture of one of :data:`FORMATS` as far as its header; Pillow's other formats may start programs."""
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most_pixels())
    return Image.open(file, formats=readable())


@functools.cache
def readable() -> tuple[str, ...]:
    """Return those of :data:`FORMATS` that can be read here: HEIF with the package pillow-heif."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def most_pixels() -> int:
    """Return the most pixels of a picture that is read: ``$PRA_MAX_PIXELS``, by default :data:`MOST_PIXELS`."""
    return variable("PRA_MAX_PIXELS", str(MOST_PIXELS), least=1, fix=_LARGER)


def most_bytes() -> int:
    """Return the most bytes of a picture's file: those of 16 bits in four channels, not compressed."""
    return 8 * most_pixels() + 2**20


def check_size(image: Image.Image, where: str) -> None:
    """Refuse a picture of too many pixels, as CorruptImage, before they are read."""
    if image.width * image.height > (most := most_pixels()):
        problem = f"{image.width}x{image.height} are more than {most:,} pixels"
        raise corrupt(where, f"{problem} ({_MORE_PIXELS})", "too-large")


def check_aspect(image: Image.Image, size: tuple[int, int], where: str) -> None:
    """Refuse a picture that is too narrow to be scaled to cover ``size`` (height, width), as CorruptImage."""
    short, long = sorted((image.height * size[1], image.width * size[0]))
    if long > (most := variable("PRA_MAX_ASPECT", str(MOST_ASPECT), least=1, fix=_LARGER)) * short:
        wanted = f"{size[1]}x{size[0]}"
        problem = f"{image.width}x{image.height} pixels are more than {most} times as narrow as the crop of {wanted}"
        raise corrupt(where, f"{problem} (PRA_MAX_ASPECT allows more)", "too-large")


def decode(data: bytes, where: str) -> Image.Image:
    """Return the (first) picture in an encoded file, or raise CorruptImage; ``where`` names it in the message."""
    with _explained(where):
        image = open_image(io.BytesIO(data))
        check_size(image, where)
        image.load()
    check_range(image, where)
    return image


def header(path: Path) -> Image.Image:
    """Return the (first) picture in a file, upright, with its size and mode but not yet its pixels."""
    with _explained(str(path)), open_image(path) as image:
        check_size(image, str(path))
        if image.width != image.height:  # turning a square does not change its size
            upright(image)
    check_range(image, str(path))
    return image


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except PraError:
        raise
    except UnidentifiedImageError:
        raise corrupt(where, f"not an image in any format that is read here ({', '.join(readable())})") from None
    except Image.DecompressionBombError:
        raise corrupt(where, f"more than {most_pixels():,} pixels ({_MORE_PIXELS})", "too-large") from None
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
    known = readable()  # first, as it registers endings
    return not name.startswith(".") and Image.EXTENSION.get(PurePath(name).suffix.lower()) in known


def is_picture_name(name: str) -> bool:
    """Return whether a file has the extension of a picture, of a format that can be read or of another."""
    known = PurePath(name).suffix.lower() in Image.registered_extensions()
    return known or str(mimetypes.guess_type(name, strict=False)[0]).startswith("image/")


@functools.cache
def warn_once(text: str) -> None:
    """Warn about a file: once, as a training opens its source more than once, and on rank 0 alone."""
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
        self.name, self.labels = name, labels
        self.classes = tuple(_TO_ESCAPE.sub(lambda c: ascii(c[0])[1:-1], str(class_name)) for class_name in classes)

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
