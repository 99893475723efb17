"""``pra complete``."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pra
from pra.data import open_source
from pra.utils.pixels import GAP, from_uint8


@pytest.fixture
def digits(tmp_path):
    """Two pictures that the model was not trained on."""
    source = open_source("digits@test")
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        source.image(index).save(path)
    return paths


def pixels(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy())


def test_one_image_once_is_a_picture_of_its_size(call, trained, digits, picture):
    words = ("complete", trained, digits[0], "--seeds", "3", "--rows")
    said = call(*words, "2", "--out", "a.png").out
    assert said.endswith("1 image continued from 2 of 4 rows, 1 time each: a.png\n")
    assert torch.equal(pixels("a.png")[:4], pixels(digits[0])[:4])
    assert not torch.equal(pixels("a.png")[4:], pixels(digits[0])[4:])
    assert call(*words, "4", "--out", "b.png").code == 0
    assert torch.equal(pixels("b.png"), pixels(digits[0]))
    image = picture("bw.png", mode="1")  # is converted
    assert call("complete", trained, image, "--rows", "4", "--seeds", "0", "--out", "c.png").code == 0
    assert torch.equal(pixels("c.png"), pixels(image) * torch.tensor(255, dtype=torch.uint8))


def test_arrays_and_files_are_the_sampler_s_images(call, trained, digits):
    """A label each; two pictures of one name."""
    first, second = digits[0], Path("elsewhere") / digits[0].name
    second.parent.mkdir()
    shutil.copy(digits[1], second)
    words = ("complete", trained, first, second, "--rows", "1", "--seeds", "0,2", "--label", "3,7", "--out")
    assert [call(*words, out).code for out in ("out.npz", "out", "out.PNG")] == [0, 0, 0]
    with Image.open("out.PNG") as grid:  # the image, the part that was kept, two continuations
        assert grid.size == (4 * (64 + GAP) + GAP, 2 * (64 + GAP) + GAP)
    names = [f"{place:04d}-0-seed{seed:06d}.png" for place in (0, 1) for seed in (0, 2)]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    real = torch.stack([from_uint8(pixels(path))[None] for path in (first, first, second, second)])
    expected = pra.Sampler(pra.load(trained)).complete(real, 1, [3, 3, 7, 7], [0, 2, 0, 2])
    with np.load("out.npz") as arrays:
        assert np.array_equal(arrays["arr_0"][..., 0], pra.to_uint8(expected)[:, 0])
        assert arrays["arr_1"].tolist() == [3, 3, 7, 7]
        for name, one in zip(names, arrays["arr_0"], strict=True):
            assert np.array_equal(pixels(Path("out") / name), one[..., 0])


def test_pictures_of_any_name_are_written(call, trained, picture):
    for name in ("l" * 240, "caf\udce9\n*"):
        picture(f"{name}.png")
        assert call("complete", trained, f"{name}.png", "--rows", "1", "--seeds", "0", "--out", "out").code == 0
        (made,) = Path("out").iterdir()
        assert made.name in (f"0000-{'l' * 100}-seed000000.png", "0000-caf----seed000000.png")
        shutil.rmtree("out")


def test_images_of_another_kind_are_refused(call, trained, picture):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save("deep.png")
    whole = picture("whole.png").read_bytes()
    for name, data in (("text.png", b"hello"), ("cut.png", whole[:60])):
        Path(name).write_bytes(data)
    Path("folder").mkdir()
    for name, *parts in (
        (picture("wide.png", 9), "9x8 L", "8x8 L"),
        (picture("colour.png", mode="RGB"), "8x8 RGB"),
        (picture("palette.png", mode="P"), "8x8 RGB"),
        (picture("print.tif", mode="CMYK"), "8x8 CMYK"),
        (picture("float.tif", mode="F"), "no known range"),
        ("deep.png", "I;16"), ("text.png",), ("cut.png",), ("missing.png",), ("folder",),
    ):  # fmt: skip
        assert call("complete", trained, name, "--rows", "1").is_refusal(name, *parts)


def test_bad_options_are_refused(call, trained, picture):
    picture("x.png")
    for options, *parts in (
        ("x.png --rows 5", "rows 5", "0 to 4"),
        ("x.png --rows -1", "rows -1"),
        ("x.png --rows 1 --label 1,2", "2 classes (--label 1,2) for 1 image"),
        ("x.png --rows 1 --label 10", "label 10"),
        ("--rows 1", "IMAGE"),
    ):
        assert call("complete", trained, *options.split()).is_refusal(*parts)
    assert [path.name for path in Path().iterdir()] == ["x.png"]


def test_pictures_that_do_not_end_are_refused(call, trained, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", tmp_path / "zero.png"):
        code, _, [error] = call("complete", trained, path, "--rows", "1")
        assert (code, "not a regular file" in error) == (2, True)
