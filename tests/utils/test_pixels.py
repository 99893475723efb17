"""Tensors to pictures and back, and contact sheets."""

import numpy as np
import pytest
import torch
from support.refusal import refused

from pra.utils.pixels import GAP, contact_sheet, from_uint8, to_pil, to_uint8


def random_images(count, channels, height=8, width=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


def cells(*values):
    """Pictures of 4 by 4 pixels, each of one value per channel."""
    return torch.tensor(values, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)


def test_uint8_survives_floats():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values).aminmax() == (-1.0, 1.0)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_image_holds_the_pixels(channels, mode):
    image = random_images(1, channels)[0]
    picture = to_pil(from_uint8(image))
    assert (picture.mode, picture.size) == (mode, (6, 8))
    assert np.array_equal(np.asarray(picture).reshape(8, 6, channels), image.permute(1, 2, 0))
    refused(lambda: to_pil(random_images(1, 2)[0]), ".npz", code="unsupported", value=2)


def test_contact_sheet_places_images_by_row():
    images = random_images(5, 3, 64, 70)
    sheet = contact_sheet(images, columns=2)
    assert sheet.size == (2 * (70 + GAP) + GAP, 3 * (64 + GAP) + GAP)
    pixels = np.asarray(sheet)
    for index, image in enumerate(images):
        top, left = (GAP + n * (size + GAP) for n, size in zip(divmod(index, 2), (64, 70), strict=True))
        assert np.array_equal(pixels[top : top + 64, left : left + 70], image.permute(1, 2, 0))
    assert (pixels[-66:, -72:] == 255).all()  # the sixth place is empty
    grey = contact_sheet(cells((10,), (10,)), 2)
    assert (grey.mode, grey.getpixel((GAP, GAP))) == ("L", 10)


def test_contact_sheet_of_small_images_is_enlarged():
    assert contact_sheet(random_images(2, 1), columns=2).height == 64 + 2 * GAP
    assert contact_sheet(random_images(2, 1, 100, 100), columns=2).height == 100 + 2 * GAP
    assert contact_sheet(random_images(1, 1), columns=1).size == (6, 8)  # a single image stays as it is
    assert contact_sheet(cells((1, 2, 3, 4)), 1).getpixel((0, 0)) == (1, 2, 3, 4)


def test_contact_sheet_is_white_behind_transparency():
    sheet = contact_sheet(cells((0, 0, 0, 0), (200, 0, 0, 255), (0, 0, 200, 51)), 3)
    assert sheet.mode == "RGB"
    pixels, side = np.asarray(sheet), 64
    seen = [pixels[GAP + 1, GAP + 1 + place * (side + GAP)] for place in range(3)]
    assert [tuple(map(int, pixel)) for pixel in seen] == [(255, 255, 255), (200, 0, 0), (204, 204, 244)]
    assert (pixels[:GAP] == 255).all()
