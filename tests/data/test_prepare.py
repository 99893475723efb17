"""Preparation of pictures as a model's arrays: crops, padding, colour and flips."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import config, picture
from support.refusal import refused

from pra.config import Fit, OnSmall
from pra.data import prepare


def fitted(image, size, channels, how=None, key=None):
    return prepare(image, size, channels, how or config(), None if key is None else torch.tensor(key), "a.png")


def adm_center_crop(image, size):
    """Crop to the central square, as guided-diffusion does."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (33, 32), (100, 67), (64, 64), (16, 999)])
def test_center_crop_equals_adm(shape):
    result = fitted(picture(*shape), (16, 16), 3, key=1)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert (result == adm_center_crop(picture(*shape), 16)).all()


def test_center_crop_not_square_takes_the_middle():
    ramp = np.tile(np.arange(40, dtype=np.uint8), (16, 1))
    assert (fitted(Image.fromarray(ramp), (16, 8), 1)[0] == ramp[:, 16:24]).all()
    assert (fitted(Image.fromarray(ramp.T.copy()), (8, 16), 1)[0] == ramp.T[16:24]).all()
    for height, width in itertools.product((9, 12, 50), (21, 22, 80)):
        assert fitted(picture(height, width), (9, 21), 3).shape == (3, 9, 21)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("fit", [Fit.CENTER_CROP, Fit.PAD])
def test_prepare_right_size_changes_nothing(mode, channels, fit):
    image = picture(8, 12, mode=mode)
    if channels == 4:
        image.putalpha(picture(8, 12, seed=1, mode="L"))
    result = fitted(image, (8, 12), channels, config(fit=fit), key=5)
    assert (result.transpose(1, 2, 0).reshape(np.asarray(image).shape) == np.asarray(image)).all()


def test_random_crop_is_a_function_of_the_key():
    image = Image.fromarray(np.add.outer(np.arange(64) * 3, np.arange(64)).astype(np.uint8))
    how = config(fit=Fit.RANDOM_CROP)
    assert (fitted(image, (16, 16), 1, how, 3) == fitted(image, (16, 16), 1, how, 3)).all()
    assert len({fitted(image, (16, 16), 1, how, key).tobytes() for key in range(40)}) > 12
    assert (fitted(image, (16, 16), 1, how) == fitted(image, (16, 16), 1)).all()


def test_random_crop_reaches_all_places_and_zooms():
    columns = Image.fromarray(np.tile(np.arange(160, dtype=np.uint8), (32, 1)))
    rows = [fitted(columns, (32, 32), 1, config(fit=Fit.RANDOM_CROP), key)[0, 16].astype(int) for key in range(200)]
    steps = [(row[-1] - row[0]) / 31 for row in rows]
    assert min(row[0] for row in rows) < 3
    assert max(row[0] for row in rows) > 125
    assert (min(steps), max(steps)) == pytest.approx((1 / 1.25, 1), abs=1 / 31)


def test_flip_mirrors_half_of_the_images():
    image = picture(8, 8)
    plain = np.asarray(image).transpose(2, 0, 1)
    assert all((fitted(image, (8, 8), 3, config(fit=fit, flip=True)) == plain).all() for fit in Fit)
    flipped = 0
    for key in range(100):
        result = fitted(image, (8, 8), 3, config(flip=True), key)
        assert (result == plain).all() or (result == plain[:, :, ::-1]).all()
        flipped += not (result == plain).all()
    assert 30 < flipped < 70


def test_pad_puts_the_image_in_the_middle():
    result, image = fitted(picture(3, 4, mode="L"), (8, 9), 1, config(fit=Fit.PAD)), picture(3, 4, mode="L")
    assert (result[0] == np.pad(np.asarray(image), ((2, 3), (2, 3)))).all()


@pytest.mark.parametrize(
    ("fit", "shape", "fix"),
    [
        *((Fit.PAD, shape, "data.fit=center-crop") for shape in ((17, 4), (4, 18))),
        *((Fit.CENTER_CROP, shape, "data.on_small=upscale") for shape in ((15, 40), (40, 15), (1, 1))),
        (Fit.RANDOM_CROP, (15, 40), "data.on_small=upscale"),
    ],
)
def test_prepare_image_of_unfit_size_is_refused(fit, shape, fix):
    image, fields = picture(*shape), {"where": "a.png", "pixels": f"{shape[0]}x{shape[1]}", "size": "16x16"}
    refused(lambda: fitted(image, (16, 16), 3, config(fit=fit), 0), fix, code="mismatch", **fields)
    if fit is not Fit.PAD:
        upscale = config(fit=fit, on_small=OnSmall.UPSCALE)
        assert fitted(image, (16, 16), 3, upscale, 0).shape == (3, 16, 16)
        assert (fitted(image, (16, 16), 3, upscale) == adm_center_crop(image, 16)).all()


def test_prepare_converts_channels():
    refused(lambda: fitted(picture(), (4, 4), 2), code="invalid", value=2)
    grey = fitted(picture(4, 4), (4, 4), 1)
    assert (grey[0] == np.asarray(picture(4, 4, mode="L"))).all()
    assert (fitted(picture(4, 4, mode="L"), (4, 4), 3) == grey).all()
    assert (fitted(picture(4, 4), (4, 4), 4)[3] == 255).all()


def file_with(image, kind, **options):
    """Return the image as Pillow reads it back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def test_prepare_transparency_becomes_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = 200, 100, 0, 255
    pixels[1, 1] = 0, 0, 0, 51
    seen = np.array([[[200, 100, 0]] * 2, [[255] * 3, [204] * 3]]).transpose(2, 0, 1)
    rgba = Image.fromarray(pixels)
    assert (fitted(file_with(rgba, "png"), (2, 2), 3) == seen).all()
    assert (fitted(rgba, (2, 2), 4) == pixels.transpose(2, 0, 1)).all()
    grey = fitted(Image.fromarray(pixels[..., [2, 3]], "LA"), (2, 2), 1)
    assert grey[0].tolist() == [[0, 0], [255, 204]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 200, 100, 0])
    palette.putpixel((0, 0), 0)
    for kind in ("gif", "png"):
        result = fitted(file_with(palette, kind, transparency=0), (2, 2), 3)
        assert result[:, 0, 0].tolist() == [255] * 3
        assert result[:, 1, 1].tolist() == [200, 100, 0]
    keyed = file_with(Image.new("RGB", (2, 2), (1, 2, 3)), "png", transparency=(1, 2, 3))
    assert (fitted(keyed, (2, 2), 3) == 255).all()
    assert (fitted(keyed, (2, 2), 4)[3] == 0).all()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_prepare_sixteen_bits_are_scaled(kind):
    values = np.array([[0, 257 * 7, 128], [129, 65534, 65535]], np.uint16)
    assert fitted(file_with(Image.fromarray(values), kind), (2, 3), 1)[0].tolist() == [[0, 7, 0], [1, 255, 255]]


def test_prepare_converts_every_mode_or_refuses():
    for mode, channels in itertools.product(["1", "P", "CMYK", "YCbCr", "LAB", "HSV", "LA", "I", "I;16B"], [1, 3, 4]):
        assert fitted(Image.new(mode, (4, 4)), (4, 4), channels).shape == (channels, 4, 4)
    floats = Image.new("F", (4, 4))
    refused(lambda: fitted(floats, (4, 4), 1), "8 or 16 bits", code="unreadable", where="a.png")
