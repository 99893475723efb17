"""A visitor's picture, of any size, brought to what a model needs; and what was done to it, in words."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pra.config import DataConfig, Fit, ImageConfig
from pra.data.images import CorruptImage, upright
from pra.data.prepare import prepare
from pra.errors import PraError
from pra.utils.pixels import from_uint8

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
"""That are opened. Of Pillow's others one starts a program: EPS is drawn by Ghostscript."""

MOST_BYTES = 32 * 2**20
MOST_PIXELS = 64_000_000
NARROWEST = 20
"""Longest over shortest side: scaled to the model's size, a thread would take all memory."""


@dataclass(frozen=True)
class Upload:
    """A picture that was read: upright, in its own size and colours.

    Args:
        name: the file's.
        picture: what it holds; of an animation the first picture.
        done: what reading it took, in words.
    """

    name: str
    picture: Image.Image
    done: tuple[str, ...] = ()


def read_upload(path: Path) -> Upload:
    """The picture in a file.

    Raises:
        PraError: no picture of these formats, a damaged one, or a size beyond the limits.
    """
    name = path.name
    try:
        picture = Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS)
        _check_size(name, *picture.size)
        moving = getattr(picture, "is_animated", False)  # to count its frames would walk through all of them
        picture.load()
    except PraError:
        raise
    except UnidentifiedImageError:
        raise _unreadable(name, "not an image in any format that is taken here") from None
    except Exception as error:  # on broken bytes Pillow's plugins raise whatever they stumble over
        raise _unreadable(name, f"cannot be decoded ({' '.join(str(error).split())[:120]})") from None
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
    done = ("first picture of an animation",) if moving else ()
    return Upload(name, upright(picture), (*done, "turned upright") if turned else done)


def fit_upload(upload: Upload, model: ImageConfig, data: DataConfig) -> tuple[Tensor, str]:
    """The picture as a model needs it.

    Args:
        upload: what was read.
        model: the size and channels to bring it to.
        data: whether to pad, as far as the picture is small enough for that, or to crop.

    Returns:
        ``(C, H, W)`` in [-1, 1], and one line that says what was done.

    Raises:
        PraError: pixels that have no known range.
    """
    picture, (height, width) = upload.picture, model.image_size
    done = list(upload.done)
    if data.fit is Fit.PAD and (picture.height > height or picture.width > width):
        data = replace(data, fit=Fit.CENTER_CROP)
    if picture.has_transparency_data and model.channels != 4:
        done.append("put on white")
    if _is_grey(picture) != (model.channels == 1):
        done.append("turned grey" if model.channels == 1 else "taken as colour")
    if picture.size != (width, height):
        done.append(_resizing(picture, width, height, data.fit))
    try:
        pixels = prepare(picture, model.image_size, model.channels, data, None, upload.name)
    except CorruptImage as error:
        raise _unreadable(upload.name, error.problem) from None
    line = f"{upload.name} ({picture.width}x{picture.height}): {', '.join(done) or 'taken as it is'}"
    return from_uint8(torch.from_numpy(pixels)), line


def _resizing(picture: Image.Image, width: int, height: int, fit: Fit) -> str:
    if fit is Fit.PAD:
        return f"padded with black to {width}x{height}"
    scaling = "enlarged" if picture.width < width or picture.height < height else "scaled"
    whole = picture.width * height == picture.height * width
    return f"{scaling} to {width}x{height}" if whole else f"{scaling}, and the middle {width}x{height} cut out"


def _is_grey(picture: Image.Image) -> bool:
    return picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise PraError(
            f"{name} has {width}x{height} pixels, more than {MOST_PIXELS // 10**6} million; give a smaller picture"
        )
    if max(width, height) > NARROWEST * min(width, height):
        raise PraError(
            f"{name} has {width}x{height} pixels, and one side is more than {NARROWEST} times the other; cut out a part"
        )


def _unreadable(name: str, problem: str) -> PraError:
    return PraError(f"{name}: {problem}; give another picture: JPEG, PNG, WebP, GIF, TIFF, BMP or PPM")
