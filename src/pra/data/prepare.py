"""Turn a picture of any size and mode into the array that the model sees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from pra.config import DataConfig, Fit, OnSmall
from pra.data.images import check_aspect, check_range
from pra.errors import PraError
from pra.method.noise import Purpose, fold, uniform
from pra.utils.pixels import MODES

_MAX_ZOOM = 1.25


def prepare(
    image: Image.Image,
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    key: Tensor | None,
    where: str,
) -> npt.NDArray[np.uint8]:
    """Return an image as uint8 ``(channels, *size)``; channels are 1 (grey), 3 (RGB) or 4 (RGBA).

    Random crops and flips are functions of ``key``, a 64-bit integer; None means neither. ``where`` names the image.

    Raises:
        PraError: an image too small for the crop or too large for the padding, another number of channels, or, as
            :class:`pra.data.images.CorruptImage`, a mode without a known range or too narrow an image.
    """
    image = convert(image, channels, where)
    draws = None if key is None else uniform(fold(key, Purpose.AUGMENT), 4).tolist()
    if config.fit is Fit.PAD:
        if image.height > size[0] or image.width > size[1]:
            raise _unfit(image, size, where, "larger than the canvas", "Cut such images: --set data.fit=center-crop")
        canvas = Image.new(image.mode, (size[1], size[0]))
        canvas.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
        pixels = np.asarray(canvas)
    else:
        check_aspect(image, size, where)  # before it is scaled: 20000x1 pixels would take gigabytes
        if config.on_small is OnSmall.ERROR and (image.height < size[0] or image.width < size[1]):
            fix = "Enlarge such images: --set data.on_small=upscale"
            raise _unfit(image, size, where, "smaller than the crop", fix)
        pixels = _crop(image, size, draws[:3] if draws and config.fit is Fit.RANDOM_CROP else None)
    if config.flip and draws and draws[3] < 0.5:
        pixels = pixels[:, ::-1]
    return pixels.reshape(*size, channels).transpose(2, 0, 1).copy()


def convert(image: Image.Image, channels: int, where: str) -> Image.Image:
    """Return the image in the mode of ``channels``; transparent parts turn white, unless the model sees alpha."""
    if channels not in MODES:
        raise PraError(f"channels: {channels} is not supported. Use 1 (grey), 3 (RGB) or 4 (RGBA)", value=channels)
    check_range(image, where)
    if image.mode.startswith("I"):  # 16 bits, 0 to 65535: Pillow's own conversion to 8 bits clips
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    mode = MODES[channels]
    if image.mode == mode and "transparency" not in image.info:
        return image
    if mode != "RGBA" and image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    if mode == "L" and image.mode != "1":
        image = image.convert("RGB")  # Pillow cannot turn LAB and others into grey directly
    return image.convert(mode)


def _unfit(image: Image.Image, size: tuple[int, int], where: str, problem: str, fix: str) -> PraError:
    pixels, wanted = f"{image.height}x{image.width}", f"{size[0]}x{size[1]}"
    text = f"{where}: {pixels} pixels (height x width), {problem} of {wanted}. {fix}, or choose another size"
    return PraError(text, "mismatch", where=where, pixels=pixels, size=wanted)


def _crop(image: Image.Image, size: tuple[int, int], draws: list[float] | None) -> npt.NDArray[np.uint8]:
    """Scale the image until it covers ``size``, or up to 1.25 times that at random; then cut ``size`` out.

    ``draws`` are three uniform numbers (zoom, row, column). None is ADM's ``center_crop_arr``, for any ``size``.
    """
    zoom = 1 + (_MAX_ZOOM - 1) * draws[0] if draws else 1.0
    pixels = np.asarray(cover(image, round(size[0] * zoom), round(size[1] * zoom)))
    rows, columns = pixels.shape[0] - size[0], pixels.shape[1] - size[1]
    top, left = rows // 2, columns // 2
    if draws:
        top, left = int(draws[1] * (rows + 1)), int(draws[2] * (columns + 1))
    return pixels[top : top + size[0], left : left + size[1]]


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return the smallest scaled copy that covers ``height x width``."""
    # Halve first: ADM's training images, and so published figures, were made this way.
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    scaled = round(image.width * scale), round(image.height * scale)
    return image.resize(scaled, Image.Resampling.BICUBIC)
