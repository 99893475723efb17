"""Grids are on white, whatever the channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pra.utils.pixels import GAP, contact_sheet


def cells(*values: tuple[int, ...]) -> torch.Tensor:
    """Pictures of 4 by 4 pixels, each of one value per channel."""
    return torch.tensor(values, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)


@pytest.mark.parametrize("upscale", [1, 3, None])
def test_what_is_transparent_in_a_grid_is_white(upscale: int | None) -> None:
    sheet = contact_sheet(cells((0, 0, 0, 0), (200, 0, 0, 255), (0, 0, 200, 51)), 3, upscale)
    assert sheet.mode == "RGB"
    pixels, side = np.asarray(sheet), 4 * (upscale or 16)
    seen = [pixels[GAP + 1, GAP + 1 + place * (side + GAP)] for place in range(3)]
    assert [tuple(map(int, pixel)) for pixel in seen] == [(255, 255, 255), (200, 0, 0), (204, 204, 244)]
    assert (pixels[:GAP] == 255).all()


@pytest.mark.parametrize(("values", "mode"), [((10,), "L"), ((10, 20, 30), "RGB")])
def test_without_alpha_a_grid_shows_the_pixels(values: tuple[int, ...], mode: str) -> None:
    sheet = contact_sheet(cells(values, values), 2, 1)
    assert sheet.mode == mode
    assert np.asarray(sheet)[GAP, GAP].tolist() == (values[0] if mode == "L" else list(values))


def test_a_picture_alone_keeps_its_alpha() -> None:
    assert contact_sheet(cells((1, 2, 3, 4)), 1).getpixel((0, 0)) == (1, 2, 3, 4)
