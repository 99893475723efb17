"""Pixels: tensors in [-1, 1] to uint8, PIL images and contact sheets, and back."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from pra.errors import PraError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GAP = 2
"""Pixels between the cells of a grid."""
MOST_IN_SHEET = 500_000_000
"""Pixels of a contact sheet: 2 GB while it is drawn."""


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


def _cell(height: int, width: int) -> tuple[int, int]:
    factor = max(1, -(-64 // height))
    return height * factor, width * factor


def sheet_size(count: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """Return the width and height of a :func:`contact_sheet`. Refuse more than :data:`MOST_IN_SHEET` pixels."""
    tall, wide = _cell(height, width)
    size = columns * (wide + GAP) + GAP, -(-count // columns) * (tall + GAP) + GAP
    if size[0] * size[1] > MOST_IN_SHEET:
        problem = f"one sheet of {count:,} images has {size[0]}x{size[1]} pixels, of {MOST_IN_SHEET:,} at most"
        raise PraError(f"{problem}. Write FILE.npz or a folder DIR/ instead, or fewer images", "too-large", value=count)
    return size


def contact_sheet(images: Tensor, columns: int) -> Image.Image:
    """Return images ``(B, C, H, W)`` in [-1, 1], or uint8, as one picture, row by row, on white.

    Small images are enlarged by a whole factor to at least 64 pixels high; a single image stays as it is. Refuses what
    :func:`sheet_size` does.
    """
    if len(images) == 1:
        return to_pil(images[0])
    height, width = _cell(images.shape[2], images.shape[3])
    cells = [to_pil(image) for image in images]
    mode = "RGB" if cells[0].mode == "RGBA" else cells[0].mode
    sheet = Image.new(mode, sheet_size(len(cells), columns, *images.shape[2:]), "white")
    for index, cell in enumerate(cells):
        row, column = divmod(index, columns)
        cell = cell.resize((width, height), Image.Resampling.BICUBIC)  # bare pixels hide small shapes
        place = (GAP + column * (width + GAP), GAP + row * (height + GAP))
        sheet.paste(cell, place, cell if cell.mode == "RGBA" else None)
    return sheet
