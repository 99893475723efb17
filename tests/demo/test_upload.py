"""Uploaded pictures of any format and size."""

import re
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from support.models import LEARNED, random_model
from support.refusal import refused

from pra.config import DataConfig, Fit, OnSmall
from pra.demo import upload
from pra.demo.upload import MOST_MEMORY, MOST_PIXELS, fit_upload
from pra.utils.pixels import to_uint8

DATA = DataConfig(source="", on_small=OnSmall.UPSCALE)


def test_any_format_and_size_is_fitted_and_told(saved, tmp_path):
    for name, size, mode, told in (
        ("exact.png", (8, 6), "RGB", "used unchanged"),
        ("wide.webp", (400, 100), "RGB", "scaled, then cropped to the middle 8x6"),
        ("small.png", (4, 3), "L", "converted to colour, enlarged to 8x6"),
        ("palette.gif", (80, 60), "P", "scaled to 8x6"),
        ("print.tif", (80, 60), "CMYK", "scaled to 8x6"),
        ("bits.bmp", (80, 60), "1", "converted to colour, scaled to 8x6"),
        ("clear.png", (80, 60), "RGBA", "placed on white, scaled to 8x6"),
    ):
        pixels, line = fit_upload(saved(tmp_path / name, size, mode), LEARNED, DATA)
        assert pixels.shape == (3, 6, 8)
        assert pixels.abs().max() <= 1
        assert line == f"{name} ({size[0]}x{size[1]}): {told}"
    exif = Image.Exif()
    exif[0x0112] = 6
    _, line = fit_upload(saved(tmp_path / "turned.jpg", (30, 40), exif=exif), LEARNED, DATA)
    assert line == "turned.jpg (40x30): rotated upright, scaled to 8x6"


def test_small_picture_is_padded_where_training_does(exhibit, saved, tmp_path):
    shown = exhibit(random_model(channels=1, image_size=(8, 8)), fit=Fit.PAD)
    pixels, line = fit_upload(saved(tmp_path / "a.png", (6, 4)), shown.model.config, shown.data)
    assert line == "a.png (6x4): converted to grey, padded with black to 8x8"
    assert torch.equal(to_uint8(pixels)[0, :2], torch.zeros(2, 8, dtype=torch.uint8))
    _, line = fit_upload(saved(tmp_path / "b.png", (9, 9)), shown.model.config, shown.data)
    assert line == "b.png (9x9): converted to grey, scaled to 8x8"


def test_animation_gives_its_first_picture(tmp_path, monkeypatch):
    """Frames must not be counted: counting reads all of them."""
    frames = [Image.new("L", (8, 6), grey) for grey in range(9)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(GifImageFile, "n_frames", property(lambda _: pytest.fail("all frames are read")))
    assert "first frame of an animation" in fit_upload(tmp_path / "moving.gif", LEARNED, DATA)[1]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_other_files_and_sizes_are_refused(saved, tmp_path, monkeypatch):
    (tmp_path / "letter.jpg").write_text("Dear all")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(saved(tmp_path / "whole.png", (300, 300)).read_bytes()[:-400])
    with Image.open(saved(tmp_path / "drawing.png", (8, 6))) as drawing:
        drawing.save(tmp_path / "drawing.eps")
        drawing.save(tmp_path / "drawing.ico")
    (tmp_path / "drawing.eps").rename(tmp_path / "eps.png")
    Image.new("F", (8, 6)).save(tmp_path / "float.tif")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program is started"))
    for name in ("letter.jpg", "empty.png", "cut.png", "eps.png", "drawing.ico", "float.tif"):
        refused(lambda name=name: fit_upload(tmp_path / name, LEARNED, DATA), "JPEG", code="unreadable", name=name)
    monkeypatch.setattr(upload, "MOST_PIXELS", 6000)
    monkeypatch.setattr(upload, "MOST_OF_JPEG", 12_000)
    saved(tmp_path / "large.png", (100, 61), "1")
    saved(tmp_path / "large.jpg", (120, 101), "L")
    thread = saved(tmp_path / "thread.png", (1400, 10), "1")
    refused(lambda: fit_upload(thread, LEARNED, DATA), "1400x10", code="too-large", name="thread.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("its pixels are read"))
    for name, part in (("large.png", "100x61"), ("large.jpg", "at most 12,000")):
        refused(lambda name=name: fit_upload(tmp_path / name, LEARNED, DATA), part, code="too-large", name=name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    for most, part in ((5_000, "far too many pixels"), (10_000, "1400x10 pixels")):  # Pillow raises from twice as many
        monkeypatch.setenv("PRA_MAX_PIXELS", str(most))
        refused(lambda: fit_upload(thread, LEARNED, DATA), part, code="too-large", name="thread.png")


def in_memory(name):
    """The process's memory in bytes, now (``VmRSS``) or at most since the last reset (``VmHWM``)."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its highest memory")
def test_uploads_of_many_visitors_stay_in_bounds(saved, tmp_path):
    pixels = 1 << 21
    path = saved(tmp_path / "clear.png", (2048, pixels // 2048), "RGBA")
    fit_upload(path, LEARNED, DATA)
    before = in_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    visitors = [threading.Thread(target=fit_upload, args=(path, LEARNED, DATA)) for _ in range(8)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert in_memory("VmHWM") - before < MOST_MEMORY * pixels // MOST_PIXELS + (8 << 20)


def test_jpeg_is_decoded_at_a_fraction_of_its_size(saved, tmp_path, monkeypatch):
    loaded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: (loaded.append(self.size), load(self))[1])
    exif = Image.Exif()
    exif[0x0112] = 6
    _, line = fit_upload(saved(tmp_path / "a.jpg", (802, 601), exif=exif), LEARNED, DATA)
    assert loaded[0] == (101, 76)
    assert line == "a.jpg (601x802): rotated upright, scaled, then cropped to the middle 8x6"
