"""Folders of pictures, with and without classes."""

import os
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support.data import picture, turned
from support.refusal import refused

from pra.data import open_source
from pra.data.images import CorruptImage, readable

pytestmark = pytest.mark.filterwarnings("ignore:.*left out")


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


def fill(folder, *names):
    """Save a picture under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(folder / name, "PNG")
    return folder


def names_in(source):
    return [Path(source.where(index)).name for index in range(len(source))]


def test_folder_counts_what_is_left_out_once(animals):
    for name in ("cat/@eaDir/c.webp/THUMB_M.jpg", "__MACOSX/cat/._c.png", "cat/Thumbs.db", "dog/notes"):
        fill(animals, name)
    with pytest.warns(UserWarning, match="left out") as caught:
        open_source(f"folder:{animals}")
    [told] = [str(warning.message) for warning in caught]
    for part in (
        "6 hidden or of the system",
        "1 *.pdf (such as dog/album.pdf)",
        "1 *.md",
        "1 without an ending",
        "PNG",
    ):
        assert part in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(f"folder:{animals}").classes == ("cat", "dog")


def test_folder_of_heic_names_and_uses_its_package(tmp_path, monkeypatch):
    fill(tmp_path, "b/1.HEIC", "b/2.heic", "b/3.HEIF")
    parts = ("2 *.heic (such as b/1.HEIC)", "pip install pillow-heif")
    refused(lambda: open_source(f"folder:{tmp_path}"), *parts, code="missing", path=tmp_path)
    fill(tmp_path, "a/1.png")
    refused(lambda: open_source(f"folder:{tmp_path}"), *parts, code="missing", path=tmp_path / "b")

    def register():
        Image.OPEN["HEIF"] = PngImagePlugin.PngImageFile, None
        Image.EXTENSION |= {".heic": "HEIF", ".heif": "HEIF"}

    for known in (Image.OPEN, Image.EXTENSION):
        for name in ("HEIF", ".heic", ".heif"):
            monkeypatch.setitem(known, name, None)  # what is registered does not stay
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    readable.cache_clear()
    try:
        assert open_source(f"folder:{tmp_path}").labels.tolist() == [0, 1, 1, 1]
    finally:
        readable.cache_clear()


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test"), ("train2017", "val2017"), ("train",)])
def test_folder_of_splits_reads_the_training_split(names, tmp_path):
    for name in names:
        fill(tmp_path, f"{name}/a/1.png", f"{name}/b/2.png")
    (tmp_path / "annotations").mkdir()
    if len(names) == 1:
        (tmp_path / "annotations").rmdir()
        source = open_source(f"folder:{tmp_path}")
    else:
        with pytest.warns(UserWarning, match=f"holds splits: {names[0]} is read.*{names[1]}"):
            source = open_source(f"folder:{tmp_path}")
    assert (source.classes, len(source)) == (("a", "b"), 2)
    assert source.where(0) == f"{tmp_path}/{names[0]}/a/1.png"


def test_folder_of_other_splits_is_refused(tmp_path):
    fill(tmp_path, "one/val/1.png", "one/test/2.png", "two/train/1.png", "two/training/2.png")
    for name, example in (("one", "test"), ("two", "train")):
        folder = tmp_path / name
        refused(lambda folder=folder: open_source(f"folder:{folder}"), f"folder:{folder}/{example}", path=folder)
    fill(tmp_path, "four/train/1.png", "four/val/1.png", "four/stray.png")
    refused(lambda: open_source(f"folder:{tmp_path}/four"), "stray.png", code="conflict", path=tmp_path / "four")
    fill(tmp_path, "three/data/train/a/1.png", "three/data/val/a/1.png")
    refused(lambda: open_source(f"folder:{tmp_path}/three"), "train, val", path=tmp_path / "three/data")


def test_folder_of_vehicles_has_a_class_train(tmp_path):
    assert open_source(f"folder:{fill(tmp_path, 'train/1.png', 'bus/1.png')}").classes == ("bus", "train")


def test_folder_reads_regular_files_alone(tmp_path):
    fill(tmp_path, "a/1.png", "b/2.png")
    os.mkfifo(tmp_path / "a/pipe.png")
    for name, target in (("zero", "/dev/zero"), ("broken", "nowhere"), ("itself", "itself.png"), ("good", "1.png")):
        (tmp_path / f"a/{name}.png").symlink_to(target)
    with pytest.warns(UserWarning, match="4 pipes, devices or broken links"):
        source = open_source(f"folder:{tmp_path}")
    assert names_in(source) == ["1.png", "good.png", "2.png"]
    (tmp_path / "b/2.png").unlink()
    (tmp_path / "b/2.png").symlink_to("/dev/zero")
    refused(lambda: source.image(2), "not a regular file", code="unreadable", where=source.where(2))


def test_folder_reads_each_real_folder_once(tmp_path):
    elsewhere = fill(tmp_path / "elsewhere", "x/1.png")
    photos = fill(tmp_path / "photos", "b/1.png", "b/deep/2.png")
    for name, target in (("b/up", photos), ("b/top", "/"), ("a", photos / "b"), ("c", elsewhere), ("d", elsewhere)):
        (photos / name).symlink_to(target)
    with pytest.warns(UserWarning, match="4 links to folders that are read already"):
        source = open_source(f"folder:{photos}")
    assert (source.classes, source.labels.tolist()) == (("b", "c"), [0, 0, 1])


def test_folder_names_may_be_any_bytes(tmp_path):
    folders = (b"caf\xe9", "t\u00eate".encode(), b"a\n\x1b[1m", b"*[x]?{a,b}")
    for name in folders:
        fill(tmp_path, os.fsdecode(name + b"/na\xefve\n.png"))
    source = open_source(f"folder:{tmp_path}")
    assert set(source.classes) == {"caf\\xe9", "t\u00eate", "a\\n\\x1b[1m", "*[x]?{a,b}"}
    assert all(source.image(index).size == picture().size for index in range(4))


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
    for index, problem in enumerate(("not an image in a supported format", "No such file", "cannot be decoded")):
        where = source.where(index)
        error = refused(lambda i=index: source.image(i), problem, "on_corrupt=skip", code="unreadable", where=where)
        assert isinstance(error, CorruptImage)


def test_folder_turns_pictures_by_their_exif(tmp_path):
    upright = picture(12, 10)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=turned())
    upright.save(tmp_path / "b.png", exif=b"Exif\0\0?")
    source = open_source(f"folder:{tmp_path}")
    assert all((np.asarray(source.image(index)) == np.asarray(upright)).all() for index in range(2))


def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path, monkeypatch):
    picture(20, 30).save(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}")
    monkeypatch.setenv("PRA_MAX_PIXELS", "600")
    assert source.image(0).size == (30, 20)
    monkeypatch.setenv("PRA_MAX_PIXELS", "599")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("its pixels are read"))
        parts = ("30x20", "599", "PRA_MAX_PIXELS allows more")
        error = refused(lambda: source.image(0), *parts, code="too-large", where=source.where(0))
        assert isinstance(error, CorruptImage)
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit gives way to ours
        refused(lambda: source.image(0), *parts)
    for value in ("0", "1e9", ""):
        monkeypatch.setenv("PRA_MAX_PIXELS", value)
        refused(lambda: source.image(0), "Unset it", name="PRA_MAX_PIXELS", value=value)


def test_pictures_in_files_of_any_size_are_not_read(tmp_path):
    picture().save(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", 2**40)
    source = open_source(f"folder:{tmp_path}")
    refused(lambda: source.image(0), "1,099,511,627,776 bytes", code="unreadable", where=source.where(0))


def test_pictures_of_other_formats_are_refused(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for an EPS."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    picture().convert("RGB").save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}")
    refused(lambda: source.image(0), "JPEG, PNG, WEBP", code="unreadable", where=source.where(0))
