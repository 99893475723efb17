"""Prepare a visitor's picture of any size for a model, and say in one line what was done to it."""

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
"""Most pixels of an upload. JPEGs may have more: they are decoded at a fraction of their size. $PRA_MAX_PIXELS lowers
both."""
MOST_MEMORY = 20 * MOST_PIXELS
"""Most bytes that decoding takes: one upload is decoded at a time, and the costliest modes need 20 bytes a pixel."""
_DECODER = ThreadPoolExecutor(1, "decoder")
"""One thread for all visitors. A lock is not enough: memory freed in a thread's own heap stays in the process."""


def fit_upload(path: Path, model: ImageConfig, data: DataConfig) -> tuple[Tensor, str]:
    """Read a picture, or the first frame of an animation, and bring it to a model's size and channels.

    One thread decodes for all callers, so that decoding takes at most :data:`MOST_MEMORY` bytes.

    Returns:
        ``(C, H, W)`` in [-1, 1], and one line that says what was done.

    Raises:
        PraError: the format is unknown, the file is damaged, or the picture is too large or has no known pixel range.
    """
    return _DECODER.submit(_fitted, path, model, data).result()


def _fitted(path: Path, model: ImageConfig, data: DataConfig) -> tuple[Tensor, str]:
    height, width = model.image_size
    picture, (wide, high), done = _read(path, 2 * max(height, width))
    if data.fit is Fit.PAD and (high > height or wide > width):
        data = replace(data, fit=Fit.CENTER_CROP)
    if picture.has_transparency_data and model.channels != 4:
        done.append("placed on white")
    grey = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")
    if grey != (model.channels == 1):
        done.append("converted to grey" if model.channels == 1 else "converted to colour")
    try:
        pixels = prepare(picture, model.image_size, model.channels, data, None, path.name)
    except CorruptImage as error:
        raise _unreadable(path, error.problem, error.code) from None
    if (wide, high) != (width, height):
        small = wide < width or high < height
        scaled = "padded with black" if data.fit is Fit.PAD else "enlarged" if small else "scaled"
        whole = data.fit is Fit.PAD or wide * height == high * width
        done.append(
            f"{scaled} to {width}x{height}" if whole else f"{scaled}, then cropped to the middle {width}x{height}"
        )
    line = f"{path.name} ({wide}x{high}): {', '.join(done) or 'used unchanged'}"
    return from_uint8(torch.from_numpy(pixels)), line


def _read(path: Path, side: int) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """Return the upright picture, its full width and height, and what was done to it.

    A JPEG is decoded at a half, a quarter or an eighth of its size if both sides stay at least ``side``.
    """
    try:
        picture = open_image(io.BytesIO(path.read_bytes()))
        size = width, height = picture.size
        most = min(MOST_OF_JPEG if picture.format in ("JPEG", "MPO") else MOST_PIXELS, most_pixels())
        if width * height > most:
            problem = f"{path.name} has {width}x{height} pixels. Give a picture of at most {most:,}"
            raise PraError(problem, code="too-large", name=path.name)
        # Do not count the frames of an animation: counting reads all of them.
        done = ["first frame of an animation"] if getattr(picture, "is_animated", False) else []
        picture.draft(None, (side, side))
        picture.load()
        turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except PraError:
        raise
    except Image.DecompressionBombError:
        problem = f"{path.name} has far too many pixels. Give a picture of at most {MOST_PIXELS:,}"
        raise PraError(problem, code="too-large", name=path.name) from None
    except UnidentifiedImageError:
        raise _unreadable(path, "not an image in a supported format") from None
    except Exception as error:  # on broken bytes Pillow's plugins raise any exception
        raise _unreadable(path, f"cannot be decoded ({reason_of(error)})") from None
    if turn != 1:
        done.append("rotated upright")
    return upright(picture), size[::-1] if turn in (5, 6, 7, 8) else size, done


def _unreadable(path: Path, problem: str, code: Code = "unreadable") -> PraError:
    advice = f"Give another picture: {', '.join(readable())}"
    return PraError(f"{path.name}: {problem}. {advice}", code=code, name=path.name)
