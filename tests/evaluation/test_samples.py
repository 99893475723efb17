"""Folders of pictures, and the images of a model."""

import numpy as np
import pytest
from PIL import Image
from support.judging import run_command
from support.refusal import refused

from pra.commands.eval import evaluate_command
from pra.data import open_source
from pra.evaluation.samples import common_shape, pictures, spread


def test_spread():
    assert spread(10, 10) == list(range(10))
    assert spread(10, 3) == [0, 3, 6]


def folder(path, images, ending="png"):
    path.mkdir()
    for number, image in enumerate(images):
        image.save(path / f"{number}.{ending}")
    return open_source(f"folder:{path}")


def grey(size=(6, 4)):
    return Image.new("L", size, 90)


def colour():
    return Image.new("RGB", (6, 4), (200, 100, 0))


def test_pictures_are_shown_as_all_would_be(tmp_path):
    mixed = folder(tmp_path / "mixed", [grey(), grey(), colour(), grey()])
    assert common_shape(mixed) == ((4, 6), 3)  # one of colour is enough
    batches = list(pictures(mixed, [0, 2, 1], ((4, 6), 3), 2))
    assert [batch.start for batch in batches] == [0, 2]
    assert batches[0].images[:, :, 0, 0].tolist() == [[90] * 3, [200, 100, 0]]
    assert batches[1].images.shape == (1, 3, 4, 6)
    assert common_shape(folder(tmp_path / "palette", [grey(), colour().quantize(4)])) == ((4, 6), 3)


def test_depth_and_transparency_become_eight_bits_on_white(tmp_path):
    deep = Image.fromarray(np.full((4, 6), 51 * 257, np.uint16))
    deepest = folder(tmp_path / "grey", [Image.new("1", (6, 4), 1), grey(), deep])
    assert common_shape(deepest) == ((4, 6), 1)
    [batch] = pictures(deepest, range(3), ((4, 6), 1), 9)
    assert batch.images[:, 0, 0, 0].tolist() == [255, 90, 51]
    source = folder(tmp_path / "alpha", [Image.new("RGBA", (6, 4), (0, 0, 0, 0)), Image.new("LA", (6, 4), (10, 255))])
    [batch] = pictures(source, range(2), common_shape(source), 9)
    assert batch.images[:, :, 0, 0].tolist() == [[255] * 3, [10] * 3]


def test_first_picture_of_another_size_is_named_undecoded(tmp_path, monkeypatch):
    odd = folder(tmp_path / "odd", [grey(), grey(), grey((4, 6)), grey((7, 7))])
    monkeypatch.setattr(type(odd), "image", lambda *_: pytest.fail("a picture was decoded"))
    where = f"{tmp_path}/odd/2.png"
    for do in (lambda: common_shape(odd), lambda: run_command(evaluate_command, tmp_path / "odd", reference="digits")):
        refused(do, "6x4", f"{tmp_path}/odd/0.png", "4x6", code="mismatch", path=where)


def test_the_size_is_that_of_the_picture_held_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    for ending in ("jpg", "png"):
        source = folder(tmp_path / ending, [grey(), grey()], ending)
        grey((4, 6)).save(tmp_path / ending / f"1.{ending}", exif=turned)
        assert common_shape(source) == ((4, 6), 1)
        [batch] = pictures(source, range(2), ((4, 6), 1), 9)
        assert batch.images.shape == (2, 1, 4, 6)


def test_broken_picture_is_named(tmp_path):
    source = folder(tmp_path / "broken", [grey(), grey(), Image.effect_noise((6, 4), 50)])
    path = tmp_path / "broken" / "2.png"
    whole = path.read_bytes()
    for data in (whole[:60], b"text", b""):
        path.write_bytes(data)
        refused(lambda: list(pictures(source, range(3), ((4, 6), 1), 9)), code="unreadable", path=path)
    path.unlink()
    Image.new("F", (6, 4)).save(path, "TIFF")
    refused(lambda: common_shape(source), "floating-point", code="unreadable", path=path)
