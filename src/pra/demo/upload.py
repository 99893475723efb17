"""A visitor's picture of any size, prepared for a model, and a line about its preparation."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pra.config import DataConfig, Fit, ImageConfig
from pra.data.images import CorruptImage, most_pixels, open_image, readable, upright
from pra.data.prepare import prepare
from pra.errors import Code, PraError, reason_of
from pra.utils.pixels import from_uint8

MOST_BYTES = 32 * 2**20
MOST_PIXELS, MOST_OF_JPEG = 32_000_000, 64_000_000
"""Pixels of an upload, where $PRA_MAX_PIXELS allows them; a JPEG is decoded at a fraction of its size."""
MOST_MEMORY = 20 * MOST_PIXELS
"""Bytes that all uploads take together: the costliest modes need 20 a pixel, and one upload is decoded at a time."""
_DECODER = ThreadPoolExecutor(1, "decoder")
"""One thread for all visitors. A lock is not enough: memory freed in a thread's own heap stays in the process."""


def fit_upload(path: Path, model: ImageConfig, data: DataConfig) -> tuple[Tensor, str]:
    """Read a picture, the first one of an animation, and bring it to a model's size and channels.

    Threads take turns, and at most :data:`MOST_MEMORY` together.

    Returns:
        ``(C, H, W)`` in [-1, 1], and one line that says what was done.

    Raises:
        PraError: another format, a damaged file, a size beyond the limits, or pixels that have no known range.
    """
    return _DECODER.submit(_fitted, path, model, data).result()


def _fitted(path: Path, model: ImageConfig, data: DataConfig) -> tuple[Tensor, str]:
    height, width = model.image_size
    picture, (wide, high), done = _read(path, 2 * max(height, width))
    if data.fit is Fit.PAD and (high > height or wide > width):
        data = replace(data, fit=Fit.CENTER_CROP)
    if picture.has_transparency_data and model.channels != 4:
        done.append("put on white")
    grey = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")
    if grey != (model.channels == 1):
        done.append("turned grey" if model.channels == 1 else "taken as colour")
    try:
        pixels = prepare(picture, model.image_size, model.channels, data, None, path.name)
    except CorruptImage as error:
        raise _unreadable(path, error.problem, error.code) from None
    if (wide, high) != (width, height):
        small = wide < width or high < height
        scaled = "padded with black" if data.fit is Fit.PAD else "enlarged" if small else "scaled"
        whole = data.fit is Fit.PAD or wide * height == high * width
        done.append(f"{scaled} to {width}x{height}" if whole else f"{scaled}, and the middle {width}x{height} cut out")
    line = f"{path.name} ({wide}x{high}): {', '.join(done) or 'taken as it is'}"
    return from_uint8(torch.from_numpy(pixels)), line


def _read(path: Path, side: int) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """Return the picture, upright, its width and height in the file, and what was done to it.

    A JPEG is decoded at a half, a quarter or an eighth of its size where both sides stay at least ``side``.
    """
    try:
        picture = open_image(io.BytesIO(path.read_bytes()))
        size = width, height = picture.size
        most = min(MOST_OF_JPEG if picture.format in ("JPEG", "MPO") else MOST_PIXELS, most_pixels())
        if width * height > most:
            problem = f"{path.name} has {width}x{height} pixels. Give a picture of at most {most:,}"
            raise PraError(problem, code="too-large", name=path.name)
        # To count the frames of an animation would read all of them.
        done = ["first picture of an animation"] if getattr(picture, "is_animated", False) else []
        picture.draft(None, (side, side))
        picture.load()
        turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except PraError:
        raise
    except Image.DecompressionBombError:
        problem = f"{path.name} has far too many pixels. Give a picture of at most {MOST_PIXELS:,}"
        raise PraError(problem, code="too-large", name=path.name) from None
    except UnidentifiedImageError:
        raise _unreadable(path, "not an image in any format that is taken here") from None
    except Exception as error:  # on broken bytes Pillow's plugins raise any exception
        raise _unreadable(path, f"cannot be decoded ({reason_of(error)})") from None
    if turn != 1:
        done.append("turned upright")
    return upright(picture), size[::-1] if turn in (5, 6, 7, 8) else size, done


def _unreadable(path: Path, problem: str, code: Code = "unreadable") -> PraError:
    advice = f"Give another picture: {', '.join(readable())}"
    return PraError(f"{path.name}: {problem}. {advice}", code=code, name=path.name)
