"""Folders of pictures, with and without classes."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data import picture, turned
from support.refusal import refused

from pra.data import open_source
from pra.data.images import CorruptImage


@pytest.fixture
def animals(tmp_path):
    """Classes cat (2 images, one nested) and dog (1), and files that are not images."""
    root = tmp_path / "animals"
    for name in ("dog/b.JPEG", "cat/deep/er/a.png", "cat/c.webp", ".cache/x.png", "cat/.thumbs/y.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(name)).save(root / name)
    (root / "cat/.hidden.png").write_bytes(b"")
    (root / "dog/album.pdf").write_text("Pillow writes this format, but does not read it")
    (root / "README.md").write_text("not an image")
    return root


def test_folder_classes_are_its_sub_folders(animals):
    source = open_source(f"folder:{animals}")
    assert source.name == f"folder:{animals}"
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int64
    names = ("cat/c.webp", "cat/deep/er/a.png", "dog/b.JPEG")
    assert [source.where(i) for i in range(len(source))] == [str(animals / name) for name in names]
    assert (np.asarray(source.image(1)) == np.asarray(picture(seed=len("cat/deep/er/a.png")))).all()


def test_folder_without_classes_has_one(tmp_path):
    for name in ("b.png", "a.bmp"):
        picture().save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert (source.classes, source.labels.tolist()) == (("image",), [0, 0])
    assert source.where(0) == str(tmp_path / "a.bmp")


def test_folder_bad_input_is_refused(animals, tmp_path):
    for path in (tmp_path / "none", animals / "README.md"):
        refused(lambda path=path: open_source(f"folder:{path}"), code="missing", path=path)
    (tmp_path / "void").mkdir()
    refused(lambda: open_source(f"folder:{tmp_path}/void"), code="missing", path=tmp_path / "void")
    picture().save(animals / "stray.png")
    refused(lambda: open_source(f"folder:{animals}"), "stray.png", "cat", code="conflict", path=animals)
    (animals / "stray.png").unlink()
    (animals / "emu").mkdir()
    refused(lambda: open_source(f"folder:{animals}"), code="missing", path=animals / "emu")


def test_folder_that_cannot_be_listed_is_refused(animals, monkeypatch):
    scandir, closed = os.scandir, [animals]

    def denied(path):
        if Path(path) == closed[-1]:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    for folder in (animals, animals / "cat/deep"):
        closed.append(folder)
        refused(lambda: open_source(f"folder:{animals}"), "Permission denied", code="unreadable", path=folder)


def test_folder_corrupt_images_are_named(animals):
    source = open_source(f"folder:{animals}")
    whole = (animals / "dog/b.JPEG").read_bytes()
    (animals / "dog/b.JPEG").write_bytes(whole[: len(whole) // 2])
    (animals / "cat/c.webp").write_text("<html>")
    (animals / "cat/deep/er/a.png").unlink()
    for index, problem in enumerate(("not an image in any format", "No such file", "cannot be decoded")):
        where = source.where(index)
        error = refused(lambda i=index: source.image(i), problem, "on_corrupt=skip", code="unreadable", where=where)
        assert isinstance(error, CorruptImage)


def test_folder_turns_pictures_by_their_exif(tmp_path):
    upright = picture(12, 10)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=turned())
    upright.save(tmp_path / "b.png", exif=b"Exif\0\0?")
    source = open_source(f"folder:{tmp_path}")
    assert all((np.asarray(source.image(index)) == np.asarray(upright)).all() for index in range(2))


def test_pictures_of_other_formats_are_refused(tmp_path, monkeypatch):
    """For an EPS Pillow would start Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    picture().convert("RGB").save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}")
    refused(lambda: source.image(0), "JPEG, PNG, WEBP", code="unreadable", where=source.where(0))
