"""Pixels: tensors in [-1, 1] to uint8, PIL images and contact sheets, and back."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from pra.errors import PraError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GAP = 2
"""Pixels between the cells of a grid."""


def from_uint8(images: Tensor) -> Tensor:
    """Return ``[0, 255]`` integers as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def to_uint8(images: Tensor, truncate: bool = False) -> Tensor:
    """Return images in [-1, 1] as ``[0, 255]`` integers of the same shape, rounded; uint8 passes unchanged.

    ``truncate`` drops the fraction instead, as ADM's sampling scripts do.
    """
    if images.dtype is torch.uint8:
        return images
    values = images.float().clamp(-1, 1) * 127.5 + 127.5
    return (values if truncate else values.round()).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Return one ``(C, H, W)`` image in [-1, 1], or uint8, as a picture. Refuse channels other than 1, 3 and 4."""
    channels = len(image)
    if channels not in MODES:
        message = f"an image of {channels} channels has no picture format. Write .npz instead"
        raise PraError(message, code="unsupported", value=channels)
    array = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array.squeeze(2) if channels == 1 else array, MODES[channels])


def contact_sheet(images: Tensor, columns: int) -> Image.Image:
    """Return images ``(B, C, H, W)`` in [-1, 1], or uint8, as one picture, row by row, on white.

    Small images are enlarged by a whole factor to at least 64 pixels high; a single image stays as it is.
    """
    if len(images) == 1:
        return to_pil(images[0])
    factor = max(1, -(-64 // images.shape[2]))
    cells = [to_pil(image) for image in images]
    width, height = cells[0].width * factor, cells[0].height * factor
    rows = -(-len(cells) // columns)
    mode = "RGB" if cells[0].mode == "RGBA" else cells[0].mode
    sheet = Image.new(mode, (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        cell = cell.resize((width, height), Image.Resampling.BICUBIC)  # bare pixels hide small shapes
        place = (GAP + column * (width + GAP), GAP + row * (height + GAP))
        sheet.paste(cell, place, cell if cell.mode == "RGBA" else None)
    return sheet
