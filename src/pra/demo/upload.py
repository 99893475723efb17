"""A visitor's picture of any size, brought to what a model needs, and what was done to it in words."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pra.config import DataConfig, Fit, ImageConfig
from pra.data.images import FORMATS, CorruptImage, open_image, upright
from pra.data.prepare import prepare
from pra.errors import PraError, reason_of
from pra.utils.pixels import from_uint8

MOST_BYTES = 32 * 2**20
MOST_PIXELS = 64_000_000
NARROWEST = 20
"""Longest over shortest side: a thread scaled to the model's size would take all memory."""


def fit_upload(path: Path, model: ImageConfig, data: DataConfig) -> tuple[Tensor, str]:
    """Read a picture, the first one of an animation, and bring it to a model's size and channels.

    Returns:
        ``(C, H, W)`` in [-1, 1], and one line that says what was done.

    Raises:
        PraError: another format, a damaged file, a size beyond the limits, or pixels that have no known range.
    """
    picture, done = _read(path)
    height, width = model.image_size
    if data.fit is Fit.PAD and (picture.height > height or picture.width > width):
        data = replace(data, fit=Fit.CENTER_CROP)
    if picture.has_transparency_data and model.channels != 4:
        done.append("put on white")
    grey = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")
    if grey != (model.channels == 1):
        done.append("turned grey" if model.channels == 1 else "taken as colour")
    if picture.size != (width, height):
        small = picture.width < width or picture.height < height
        scaled = "padded with black" if data.fit is Fit.PAD else "enlarged" if small else "scaled"
        whole = data.fit is Fit.PAD or picture.width * height == picture.height * width
        done.append(f"{scaled} to {width}x{height}" if whole else f"{scaled}, and the middle {width}x{height} cut out")
    try:
        pixels = prepare(picture, model.image_size, model.channels, data, None, path.name)
    except CorruptImage as error:
        raise _unreadable(path, error.problem) from None
    line = f"{path.name} ({picture.width}x{picture.height}): {', '.join(done) or 'taken as it is'}"
    return from_uint8(torch.from_numpy(pixels)), line


def _read(path: Path) -> tuple[Image.Image, list[str]]:
    """Return the picture, upright, and what was done to it."""
    try:
        picture = open_image(io.BytesIO(path.read_bytes()))
        width, height = picture.size
        if width * height > MOST_PIXELS or max(width, height) > NARROWEST * min(width, height):
            limits = f"at most {MOST_PIXELS // 10**6} million, one side at most {NARROWEST} times the other"
            problem = f"{path.name} has {width}x{height} pixels. Give a picture of {limits}"
            raise PraError(problem, code="too-large", name=path.name)
        # To count the frames of an animation would read all of them.
        done = ["first picture of an animation"] if getattr(picture, "is_animated", False) else []
        picture.load()
    except PraError:
        raise
    except UnidentifiedImageError:
        raise _unreadable(path, "not an image in any format that is taken here") from None
    except Exception as error:  # on broken bytes Pillow's plugins raise whatever they stumble over
        raise _unreadable(path, f"cannot be decoded ({reason_of(error)})") from None
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        done.append("turned upright")
    return upright(picture), done


def _unreadable(path: Path, problem: str) -> PraError:
    advice = f"Give another picture: {', '.join(FORMATS)}"
    return PraError(f"{path.name}: {problem}. {advice}", code="unreadable", name=path.name)
