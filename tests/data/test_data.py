"""Sources, preparation, order and batches, and what is said about bad input."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from support.refusal import refused

from pra.config import DataConfig, Fit, OnCorrupt, OnSmall
from pra.data import Batch, Source, TrainingSet, batches, load_images, open_source, prepare
from pra.data.images import CorruptImage
from pra.method import noise
from pra.utils.extras import install_command

FASHION = Path("/usr/share/datasets/fashion-mnist")
Pixels = npt.NDArray[np.uint8]


def config(**changes: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(source=""), **changes)


def picture(height: int = 12, width: int = 10, seed: int = 0, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def jpeg(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed=seed).save(file, "jpeg")
    return file.getvalue()


# --- open_source --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("digit", ["'digit'", "did you mean 'digits'?", "imagenet-tar"]),
        ("digits@val", ["'digits@val'", "digits@test"]),
        ("foldr:/x", ["'foldr:/x'", "did you mean 'folder'?"]),
        ("folder:", ["'folder:'", "folder:PATH"]),
        ("idx:@test", ["'idx:@test'", "idx:PATH"]),
        ("imagenet-tar", ["'imagenet-tar'", "imagenet-tar:PATH"]),
    ],
)
def test_unknown_sources(spec: str, parts: list[str]) -> None:
    refused(lambda: open_source(spec), *parts)


def test_a_bare_path_is_answered_with_the_spec_it_lacks(tmp_path: Path) -> None:
    refused(lambda: open_source(str(tmp_path)), f"folder:{tmp_path}")


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture().save(tmp_path / "a.png")
    assert open_source("folder:~").name == "folder:~"
    refused(lambda: open_source("~"), "folder:~")


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_splits() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is in the extra 'train'")
    train, test, everything = open_source("digits"), open_source("digits@test"), datasets.load_digits()
    assert (len(train), len(test)) == (1498, 299)
    assert train.classes == test.classes == tuple("0123456789")
    assert test.labels.tolist() == everything.target[5::6].tolist()
    assert train.labels[:6].tolist() == everything.target[[0, 1, 2, 3, 4, 6]].tolist()
    assert train.labels.dtype == np.int64
    expected = np.rint(everything.images[11] * 255 / 16).astype(np.uint8)
    assert (np.asarray(test.image(1)) == expected).all()
    assert max(np.asarray(train.image(i)).max() for i in range(9)) == 255
    assert test.where(17) == "image 17 of digits@test"


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(lambda: open_source("digits"), "'digits'", install_command("train"))


# --- idx ----------------------------------------------------------------------------------------------------


def write_idx(folder: Path, count: int = 7, split: str = "train", packed: bool = False) -> Path:
    """``count`` images of 4x6 whose pixels all hold the image's index; labels 0, 1, 2, 0, ..."""
    folder.mkdir(exist_ok=True)
    images = np.arange(count, dtype=np.uint8).repeat(24).tobytes()
    labels = (np.arange(count) % 3).astype(np.uint8).tobytes()
    files = {
        f"{split}-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, count, 4, 6) + images,
        f"{split}-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, count) + labels,
    }
    for name, data in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path / "mnist", packed=packed)
    write_idx(tmp_path / "mnist", count=4, split="t10k", packed=packed)
    source = open_source(f"idx:{tmp_path}/mnist")
    assert len(source) == 7
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.labels.dtype == np.int64
    assert source.classes == ("0", "1", "2")
    assert source.image(5).size == (6, 4)
    assert (np.asarray(source.image(5)) == 5).all()
    assert len(open_source(f"idx:{tmp_path}/mnist@test")) == 4


def test_idx_names_fashion_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_idx(tmp_path / "Fashion-MNIST")
    assert open_source(f"idx:{folder}").classes[:2] == ("t-shirt", "trouser")
    monkeypatch.chdir(folder)
    assert open_source("idx:.").classes[9] == "ankle boot"


def test_idx_bad_input(tmp_path: Path) -> None:
    spec = f"idx:{tmp_path}/d"
    refused(lambda: open_source(spec), f"{tmp_path}/d", "not a folder", "IDX files")
    (tmp_path / "d").mkdir()
    refused(lambda: open_source(spec), f"{tmp_path}/d", "train-images-idx3-ubyte.gz", "download")
    images = write_idx(tmp_path / "d") / "train-images-idx3-ubyte"
    good = images.read_bytes()
    images.write_bytes(good[:-1])
    refused(lambda: open_source(spec), str(images), "promises 168 bytes and 167 follow", "download it again")
    images.write_bytes(good + b"!")
    refused(lambda: open_source(spec), str(images), "169 follow")
    images.write_bytes(good[:9])
    refused(lambda: open_source(spec), str(images), "not an IDX file")
    images.write_bytes(b"\x89PNG" + good[4:])
    refused(lambda: open_source(spec), str(images), "'89504e47'", "'00000803'", "download it again")
    images.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 0, 4, 6))
    refused(lambda: open_source(spec), str(images), "empty")
    images.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 6, 4, 6) + good[16:-24])
    refused(lambda: open_source(spec), "6 images", "7 labels")


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"x" + data, lambda data: data[:20]])
def test_idx_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    images = write_idx(tmp_path / "d", packed=True) / "train-images-idx3-ubyte.gz"
    images.write_bytes(damage(images.read_bytes()))
    refused(lambda: open_source(f"idx:{tmp_path}/d"), str(images), "truncated or damaged", "download it again")


def test_idx_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "d")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(lambda: open_source(f"idx:{tmp_path}/d"), "train-images-idx3-ubyte", "Permission denied")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST (Debian's dataset-fashion-mnist) is absent")
def test_real_fashion_mnist() -> None:
    source = open_source(f"idx:{FASHION}@test")
    assert len(source) == 10_000
    assert source.classes[int(source.labels[0])] == "ankle boot"
    image = prepare(source.image(0), (32, 32), 1, config(fit=Fit.PAD), None, "")
    assert (image[0, 2:30, 2:30] == np.asarray(source.image(0))).all()
    assert image.sum() == np.asarray(source.image(0)).sum()


# --- folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Classes cat (2 images, one nested) and dog (1), and files that are no images."""
    root = tmp_path / "animals"
    for name in ("dog/b.JPEG", "cat/deep/er/a.png", "cat/c.webp", ".cache/x.png", "cat/.thumbs/y.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(name)).save(root / name)
    (root / "cat/.hidden.png").write_bytes(b"")
    (root / "cat/notes.txt").write_text("not an image")
    (root / "dog/album.pdf").write_text("Pillow writes this format, but does not read it")
    (root / "README.md").write_text("not an image")
    return root


def test_folder(animals: Path) -> None:
    source = open_source(f"folder:{animals}")
    assert source.name == f"folder:{animals}"
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int64
    assert [source.where(i) for i in range(len(source))] == [
        str(animals / name) for name in ("cat/c.webp", "cat/deep/er/a.png", "dog/b.JPEG")
    ]
    assert (np.asarray(source.image(1)) == np.asarray(picture(seed=len("cat/deep/er/a.png")))).all()


def test_folder_without_classes(tmp_path: Path) -> None:
    for name in ("b.png", "a.bmp"):
        picture().save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    source = open_source(f"folder:{tmp_path}")
    assert source.classes == ("image",)
    assert source.labels.tolist() == [0, 0]
    assert source.where(0) == str(tmp_path / "a.bmp")


def test_folder_bad_input(animals: Path, tmp_path: Path) -> None:
    refused(lambda: open_source(f"folder:{tmp_path}/none"), f"{tmp_path}/none does not exist", "class folders")
    refused(lambda: open_source(f"folder:{animals}/README.md"), "README.md is not a folder", "class folders")
    (tmp_path / "void").mkdir()
    refused(lambda: open_source(f"folder:{tmp_path}/void"), f"{tmp_path}/void holds no images", "sub-folder")
    picture().save(animals / "stray.png")
    refused(lambda: open_source(f"folder:{animals}"), str(animals), "stray.png", "cat", "move")
    (animals / "stray.png").unlink()
    (animals / "emu").mkdir()
    refused(lambda: open_source(f"folder:{animals}"), str(animals / "emu"), "fill or remove")


def test_folder_that_cannot_be_listed(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir
    for closed in (animals, animals / "cat/deep"):

        def denied(path: Path, closed: Path = closed) -> object:
            if Path(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)
        refused(lambda: open_source(f"folder:{animals}"), f"{closed} cannot be read (Permission denied)")


def test_corrupt_images_are_named(animals: Path) -> None:
    source = open_source(f"folder:{animals}")
    skip = "--set data.on_corrupt=skip"
    whole = (animals / "dog/b.JPEG").read_bytes()
    (animals / "dog/b.JPEG").write_bytes(whole[: len(whole) // 2])
    refused(lambda: source.image(2), str(animals / "dog/b.JPEG"), "cannot be decoded", skip)
    (animals / "cat/c.webp").write_text("<html>")
    refused(lambda: source.image(0), str(animals / "cat/c.webp"), "not an image in any format", skip)
    (animals / "cat/c.webp").unlink()
    refused(lambda: source.image(0), str(animals / "cat/c.webp"), "No such file", skip)
    with pytest.raises(CorruptImage):
        source.image(0)


def test_orientation_from_exif(tmp_path: Path) -> None:
    upright = picture(12, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    upright.save(tmp_path / "b.png", exif=b"Exif\0\0?")
    source = open_source(f"folder:{tmp_path}")
    for index in range(2):
        assert (np.asarray(source.image(index)) == np.asarray(upright)).all()


# --- imagenet-tar -------------------------------------------------------------------------------------------


def tar_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def imagenet(last: int = 5) -> bytes:
    """Two classes of two and one images, out of order, and things that are to be ignored."""
    dogs = {f"n02_{i}.JPEG": jpeg(i) for i in (3, 4)} | {"._n02_3.JPEG": b"a Mac was here", "list.txt": b""}
    return tar_of({"n02.tar": tar_of(dogs), "README": b"", "n01.tar": tar_of({"n01_5.JPEG": jpeg(last)})})


@pytest.fixture
def tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "train.tar"
    path.write_bytes(imagenet())
    return path


def same_jpeg(image: Image.Image, seed: int) -> bool:
    return bool((np.asarray(image) == np.asarray(Image.open(io.BytesIO(jpeg(seed))))).all())


def test_imagenet_tar(tar: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_source(f"imagenet-tar:{tar}")
    assert "indexing train.tar" in capfd.readouterr().err
    assert source.classes == ("n01", "n02")
    assert source.labels.tolist() == [1, 1, 0]
    assert source.labels.dtype == np.int64
    assert len(source) == 3
    assert source.where(2) == f"n01/n01_5.JPEG in {tar}"
    assert all(same_jpeg(source.image(i), seed) for i, seed in enumerate((3, 4, 5)))


def test_imagenet_tar_in_other_processes(tar: Path) -> None:
    source = open_source(f"imagenet-tar:{tar}")
    source.image(0)  # opens the descriptor that neither a copy nor a fork may share
    copy = pickle.loads(pickle.dumps(source))
    assert same_jpeg(copy.image(1), 4)
    del copy
    assert same_jpeg(source.image(2), 5)
    data = TrainingSet(source, (8, 8), 3, config(workers=2), seed=0)
    here = batches(dataclass_copy(data, workers=0), 0, 2, stop=8)
    assert all(same(a, b) for a, b in zip(batches(data, 0, 2, stop=8), here, strict=True))


def test_imagenet_index_is_reused_until_the_tar_changes(tar: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def indexed_again() -> bool:
        capfd.readouterr()
        source = open_source(f"imagenet-tar:{tar}")
        assert source.labels.tolist() == [1, 1, 0]
        assert source.classes == ("n01", "n02")
        source.image(2)
        return "indexing" in capfd.readouterr().err

    index = Path(f"{tar}.index.npz")
    assert indexed_again()
    assert not indexed_again()
    assert sorted(p.name for p in tar.parent.iterdir()) == ["train.tar", "train.tar.index.npz"]
    status = tar.stat()
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert indexed_again()
    tar.write_bytes(tar.read_bytes() + bytes(512))
    os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert indexed_again()
    assert not indexed_again()
    index.write_bytes(index.read_bytes()[:-100])
    assert indexed_again()
    index.write_bytes(pickle.dumps("not to be trusted"))
    assert indexed_again()
    assert not indexed_again()


def test_imagenet_index_goes_to_the_cache_when_it_cannot_lie_beside_the_tar(
    tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path(f"{tar}.index.npz").mkdir()  # binds root as well, unlike permissions
    open_source(f"imagenet-tar:{tar}")
    [index] = (tmp_path / "cache/pra").iterdir()
    assert index.name.startswith("train.tar.")
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    open_source("imagenet-tar:train.tar")
    assert "indexing" not in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "train.tar", "train.tar.index.npz"]


def test_imagenet_index_that_can_be_saved_nowhere(tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home/.cache").mkdir(parents=True)
    (tmp_path / "home/.cache/pra").write_text("in the way")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path(f"{tar}.index.npz").mkdir()
    with pytest.warns(UserWarning, match=r"home/\.cache/pra"):
        source = open_source(f"imagenet-tar:{tar}")
    assert same_jpeg(source.image(0), 3)


def test_imagenet_tar_bad_input(tar: Path) -> None:
    spec, whole = f"imagenet-tar:{tar}", tar.read_bytes()
    way_out = "ILSVRC2012_img_train.tar"
    refused(lambda: open_source(f"{spec}x"), f"{tar}x does not exist", way_out)
    refused(lambda: open_source(f"imagenet-tar:{tar.parent}"), f"{tar.parent} is not a file", way_out)
    for no_tar in (b"", b"text" * 1000, gzip.compress(whole)):
        tar.write_bytes(no_tar)
        refused(lambda: open_source(spec), f"{tar} is not an uncompressed tar", way_out)
    for no_classes in ({"a/b.jpg": jpeg()}, {"n01.tar": tar_of({"notes.txt": b""})}):
        tar.write_bytes(tar_of(no_classes))
        refused(lambda: open_source(spec), f"{tar} holds no class tars", "folder:PATH")
    tar.write_bytes(tar_of({"n01.tar": b"text" * 1000}))
    refused(lambda: open_source(spec), f"n01.tar in {tar} is not an uncompressed tar", way_out)
    assert not Path(f"{tar}.index.npz").exists()


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_truncated_imagenet_tar(tar: Path, cut: float) -> None:
    with tarfile.open(tar) as outer:
        end = max(member.offset_data + member.size for member in outer)
    os.truncate(tar, int(end * cut))
    refused(lambda: open_source(f"imagenet-tar:{tar}"), str(tar), "truncated or damaged at byte", "again")


def test_imagenet_tar_cut_between_classes(tar: Path) -> None:
    """Python's tarfile takes this, and a broken header, for the end of the archive."""
    with tarfile.open(tar) as outer:
        last = outer.getmembers()[-1]
    whole = tar.read_bytes()
    tar.write_bytes(whole[: last.offset])
    refused(lambda: open_source(f"imagenet-tar:{tar}"), f"{tar} is truncated", f"at byte {last.offset}")
    tar.write_bytes(whole[: last.offset] + b"x" * 512 + whole[last.offset + 512 :])
    refused(lambda: open_source(f"imagenet-tar:{tar}"), f"{tar} is truncated", f"at byte {last.offset}")
    inner = last.offset_data
    tar.write_bytes(whole[: inner + 100] + b"x" * 9 + whole[inner + 109 :])
    refused(lambda: open_source(f"imagenet-tar:{tar}"), f"n01.tar in {tar}", "not an uncompressed tar")


def test_imagenet_tar_with_a_corrupt_image_or_lost(tar: Path) -> None:
    data = tar.read_bytes()
    tar.write_bytes(data.replace(jpeg(4), jpeg(4)[:99] + bytes(len(jpeg(4)) - 99)))
    source = open_source(f"imagenet-tar:{tar}")
    refused(lambda: source.image(1), f"n02/n02_4.JPEG in {tar}", "--set data.on_corrupt=skip")
    tar.rename(f"{tar}.gone")
    refused(lambda: source_again(source).image(0), f"n02/n02_3.JPEG in {tar}", "No such file")


def source_again(source: Source) -> Source:
    copy: Source = pickle.loads(pickle.dumps(source))
    return copy


# --- prepare ------------------------------------------------------------------------------------------------


def adm_center_crop(image: Image.Image, size: int) -> Pixels:
    """guided-diffusion's definition, for squares."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (33, 32), (100, 67), (64, 64), (16, 999)])
def test_center_crop_is_adm(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    result = prepare(image, (16, 16), 3, config(), torch.tensor(1), "a.png")
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert (result == adm_center_crop(image, 16)).all()


def test_center_crop_that_is_not_square() -> None:
    ramp = np.tile(np.arange(40, dtype=np.uint8), (16, 1))
    assert (prepare(Image.fromarray(ramp), (16, 8), 1, config(), None, "")[0] == ramp[:, 16:24]).all()
    tall = Image.fromarray(ramp.T.copy())
    assert (prepare(tall, (8, 16), 1, config(), None, "")[0] == ramp.T[16:24]).all()
    for height, width in itertools.product((9, 12, 50), (21, 22, 80)):
        assert prepare(picture(height, width), (9, 21), 3, config(), None, "").shape == (3, 9, 21)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("fit", [Fit.CENTER_CROP, Fit.PAD])
def test_an_image_of_the_right_size_is_untouched(mode: str, channels: int, fit: Fit) -> None:
    image = picture(8, 12, mode=mode)
    if channels == 4:
        image.putalpha(picture(8, 12, seed=1, mode="L"))
    result = prepare(image, (8, 12), channels, config(fit=fit), torch.tensor(5), "")
    assert (result.transpose(1, 2, 0).reshape(np.asarray(image).shape) == np.asarray(image)).all()


def test_random_crop() -> None:
    image = Image.fromarray(np.add.outer(np.arange(64) * 3, np.arange(64)).astype(np.uint8))
    how = config(fit=Fit.RANDOM_CROP)

    def crop(key: int) -> Pixels:
        return prepare(image, (16, 16), 1, how, torch.tensor(key), "")

    assert (crop(3) == crop(3)).all()
    crops = {crop(key).tobytes() for key in range(40)}
    assert len(crops) > 12
    centre = prepare(image, (16, 16), 1, config(), None, "")
    assert (prepare(image, (16, 16), 1, how, None, "") == centre).all()


def test_random_crop_reaches_every_place_and_zooms_at_most_by_a_quarter() -> None:
    columns = Image.fromarray(np.tile(np.arange(160, dtype=np.uint8), (32, 1)))
    how = config(fit=Fit.RANDOM_CROP)
    lefts, steps = [], []
    for key in range(300):
        row = prepare(columns, (32, 32), 1, how, torch.tensor(key), "")[0, 16].astype(int)
        lefts.append(row[0])
        steps.append((row[-1] - row[0]) / 31)
    assert min(lefts) < 3
    assert max(lefts) > 125
    assert min(steps) == pytest.approx(1 / 1.25, abs=1 / 31)
    assert max(steps) == pytest.approx(1, abs=1 / 31)


def test_flip() -> None:
    image = picture(8, 8)
    plain = np.asarray(image).transpose(2, 0, 1)
    for fit in Fit:
        once = prepare(image, (8, 8), 3, config(fit=fit, flip=True), None, "")
        assert (once == plain).all()
    flipped = 0
    for key in range(200):
        result = prepare(image, (8, 8), 3, config(flip=True), torch.tensor(key), "")
        assert (result == plain).all() or (result == plain[:, :, ::-1]).all()
        flipped += not (result == plain).all()
    assert 70 < flipped < 130


def test_pad() -> None:
    result = prepare(picture(3, 4, mode="L"), (8, 9), 1, config(fit=Fit.PAD), None, "")
    assert (result[0, 2:5, 2:6] == np.asarray(picture(3, 4, mode="L"))).all()
    result[0, 2:5, 2:6] = 0
    assert not result.any()
    for big in (picture(9, 4), picture(4, 10)):
        size = f"{big.height}x{big.width}"
        refused(
            lambda big=big: prepare(big, (8, 9), 3, config(fit=Fit.PAD), None, "a.png"),  # type: ignore[misc]
            *("a.png", size, "larger than the canvas of 8x9", "data.fit=center-crop"),
        )


@pytest.mark.parametrize("fit", [Fit.CENTER_CROP, Fit.RANDOM_CROP])
@pytest.mark.parametrize("shape", [(15, 40), (40, 15), (1, 1)])
def test_small_images(fit: Fit, shape: tuple[int, int]) -> None:
    image = picture(*shape)
    size = f"{shape[0]}x{shape[1]}"
    refused(
        lambda: prepare(image, (16, 16), 3, config(fit=fit), torch.tensor(0), "b/a.png"),
        *("b/a.png", size, "smaller than the crop of 16x16", "--set data.on_small=upscale", "recipe"),
    )
    upscale = config(fit=fit, on_small=OnSmall.UPSCALE)
    assert prepare(image, (16, 16), 3, upscale, torch.tensor(0), "").shape == (3, 16, 16)
    assert (prepare(image, (16, 16), 3, upscale, None, "") == adm_center_crop(image, 16)).all()


def test_channels() -> None:
    refused(lambda: prepare(picture(), (4, 4), 2, config(), None, ""), "channels 2", "use 1 (grey), 3 (RGB)")
    grey = prepare(picture(4, 4), (4, 4), 1, config(), None, "")
    assert (grey[0] == np.asarray(picture(4, 4, mode="L"))).all()
    colour = prepare(picture(4, 4, mode="L"), (4, 4), 3, config(), None, "")
    assert (colour == grey).all()
    alpha = prepare(picture(4, 4), (4, 4), 4, config(), None, "")
    assert (alpha[3] == 255).all()


def file_with(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The image as Pillow reads it back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def test_transparency_becomes_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = 200, 100, 0, 255
    pixels[1, 1] = 0, 0, 0, 51
    seen = np.array([[[200, 100, 0]] * 2, [[255] * 3, [204] * 3]]).transpose(2, 0, 1)
    rgba = Image.fromarray(pixels)
    assert (prepare(file_with(rgba, "png"), (2, 2), 3, config(), None, "") == seen).all()
    assert (prepare(rgba, (2, 2), 4, config(), None, "") == pixels.transpose(2, 0, 1)).all()
    grey = prepare(Image.fromarray(pixels[..., [2, 3]], "LA"), (2, 2), 1, config(), None, "")
    assert grey[0].tolist() == [[0, 0], [255, 204]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 200, 100, 0])
    palette.putpixel((0, 0), 0)
    for kind in ("gif", "png"):
        read = file_with(palette, kind, transparency=0)
        result = prepare(read, (2, 2), 3, config(), None, "")
        assert result[:, 0, 0].tolist() == [255] * 3
        assert result[:, 1, 1].tolist() == [200, 100, 0]
    keyed = file_with(Image.new("RGB", (2, 2), (1, 2, 3)), "png", transparency=(1, 2, 3))
    assert (prepare(keyed, (2, 2), 3, config(), None, "") == 255).all()
    assert (prepare(keyed, (2, 2), 4, config(), None, "")[3] == 0).all()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    values = np.array([[0, 257 * 7, 128], [129, 65534, 65535]], np.uint16)
    result = prepare(file_with(Image.fromarray(values), kind), (2, 3), 1, config(), None, "")
    assert result[0].tolist() == [[0, 7, 0], [1, 255, 255]]


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "LAB", "HSV", "LA", "I", "I;16B"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_is_converted(mode: str, channels: int) -> None:
    result = prepare(Image.new(mode, (4, 4)), (4, 4), channels, config(), None, "")
    assert result.shape == (channels, 4, 4)


def test_floating_point_pixels_are_refused() -> None:
    image = Image.new("F", (4, 4))
    refused(lambda: prepare(image, (4, 4), 1, config(), None, "a.tif"), "a.tif", "save it with 8 or 16 bits")


# --- order and batches --------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path: Path) -> Source:
    """Seven images of 4x6 whose pixels hold their index."""
    return open_source(f"idx:{write_idx(tmp_path / 'numbered')}")


def training_set(source: Source, seed: int = 0, **changes: Any) -> TrainingSet:
    return TrainingSet(source, (4, 6), 1, config(fit=Fit.PAD, **changes), seed)


def dataclass_copy(data: TrainingSet, **changes: Any) -> TrainingSet:
    changed = dataclasses.replace(data.config, **changes)
    return TrainingSet(data.source, data.size, data.channels, changed, data.seed)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.skipped == b.skipped


def test_each_epoch_is_a_permutation_of_its_own(numbered: Source) -> None:
    data = training_set(numbered)
    epochs = [[data.source_index(g) for g in range(7 * e, 7 * e + 7)] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    other = [training_set(numbered, seed=1).source_index(g) for g in range(140)]
    assert other != list(itertools.chain(*epochs))


def test_order_does_not_depend_on_what_was_asked_before(numbered: Source) -> None:
    expected = [training_set(numbered).source_index(g) for g in range(60)]
    data = training_set(numbered)
    shuffled = np.random.default_rng(0).permutation(60).tolist()
    assert [data.source_index(g) for g in shuffled] == [expected[g] for g in shuffled]


def test_samples(numbered: Source) -> None:
    data = training_set(numbered)
    for g in (0, 6, 7, 10**12):
        sample = data[g]
        assert sample.index == g
        assert sample.source_index == data.source_index(g)
        assert sample.label == sample.source_index % 3
        assert sample.image.shape == (1, 4, 6)
        assert sample.image.dtype == torch.uint8
        assert (sample.image == sample.source_index).all()
        assert sample.skipped == 0


def test_augmentation_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    picture(20, 24).save(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}")
    data = TrainingSet(source, (8, 8), 3, config(fit=Fit.RANDOM_CROP, flip=True), seed=4)
    for g in (0, 1, 100):
        key = noise.keys(4, torch.tensor(g))
        expected = prepare(source.image(0), (8, 8), 3, data.config, key, "")
        assert torch.equal(data[g].image, torch.from_numpy(expected))
    assert len({data[g].image.numpy().tobytes() for g in range(20)}) > 10
    other = TrainingSet(source, (8, 8), 3, data.config, seed=5)
    assert not torch.equal(data[0].image, other[0].image)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_global_index(numbered: Source, workers: int) -> None:
    data = training_set(numbered, workers=workers)
    state = torch.get_rng_state()
    found = list(batches(data, 5, 4, stop=19))
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch.indices.tolist() for batch in found] == [
        list(range(5, 9)), list(range(9, 13)), list(range(13, 17)), [17, 18]
    ]  # fmt: skip
    for batch in found:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.indices), 1, 4, 6)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.images[:, 0, 0, 0].tolist() == [data.source_index(int(g)) for g in batch.indices]
        assert batch.labels.tolist() == (batch.images[:, 0, 0, 0] % 3).tolist()
        assert batch.skipped == 0
    assert list(batches(data, 19, 4, stop=19)) == []


def test_batches_have_no_end_and_do_not_depend_on_workers(numbered: Source) -> None:
    streams = [batches(training_set(numbered, workers=workers, flip=True), 3, 5) for workers in (0, 1, 2)]
    for alone, one, two in itertools.islice(zip(*streams, strict=True), 12):
        assert same(alone, one)
        assert same(alone, two)


def test_batches_resume_anywhere(numbered: Source) -> None:
    data = training_set(numbered, flip=True)
    whole = list(batches(data, 0, 4, stop=40))
    for start in range(1, 10):
        resumed = list(batches(training_set(numbered, flip=True), 4 * start, 4, stop=40))
        assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


def test_workers_leave_signals_to_the_main_process(numbered: Source) -> None:
    others = multiprocessing.active_children()
    stream = batches(training_set(numbered, workers=1), 0, 2)
    next(stream)
    [worker] = [process for process in multiprocessing.active_children() if process not in others]
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for _ in range(10):
        next(stream)
    assert worker.is_alive()
    del stream
    worker.join(10)
    assert not worker.is_alive()


# --- corrupt images in training -----------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Source:
    """Six images of 4x6 of which 1, 2 and 4 are broken."""
    for index in range(6):
        Image.new("L", (6, 4), index).save(tmp_path / f"{index}.png")
    for index in (1, 2, 4):
        path = tmp_path / f"{index}.png"
        path.write_bytes(path.read_bytes()[:50])
    return open_source(f"folder:{tmp_path}")


def test_corrupt_images_are_passed_over_and_counted(damaged: Source) -> None:
    data = training_set(damaged, on_corrupt=OnCorrupt.SKIP)
    for g in range(60):
        epoch = g - g % 6
        ahead = [data.source_index(epoch + (g + i) % 6) for i in range(6)]
        taken = next(i for i, index in enumerate(ahead) if index in (0, 3, 5))
        sample = data[g]
        assert (sample.source_index, sample.skipped) == (ahead[taken], taken)
        assert (sample.image == sample.source_index).all()
        assert sample.index == g
    total = sum(data[g].skipped for g in range(12))
    assert total > 0
    [batch] = batches(data, 0, 12, stop=12)
    assert batch.skipped == total


def test_no_image_that_can_be_read(damaged: Source, tmp_path: Path) -> None:
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    data = training_set(damaged, on_corrupt=OnCorrupt.SKIP)
    refused(lambda: data[0], "none of the 6 images", damaged.name, ".png", "check the data")


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_from_workers_as_they_were(damaged: Source, workers: int) -> None:
    data = training_set(damaged, workers=workers)
    bad = next(g for g in range(6) if data.source_index(g) in (1, 2, 4))
    expected = f"{damaged.where(data.source_index(bad))}: "
    with pytest.raises(CorruptImage) as raised:
        list(batches(data, bad, 1, stop=bad + 1))
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)
    large = TrainingSet(damaged, (8, 8), 1, config(workers=workers, on_corrupt=OnCorrupt.SKIP), seed=0)
    refused(lambda: next(batches(large, 0, 2)), ".png: 4x6 pixels", "8x8", "data.on_small=upscale")


def test_load_images(numbered: Source) -> None:
    images, labels = load_images(numbered, [4, 0, 4], (8, 8), 3, config(fit=Fit.PAD, flip=True))
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 8, 8)
    assert images.amax((1, 2, 3)).tolist() == [4, 0, 4]
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.int64
    how = config(fit=Fit.RANDOM_CROP, flip=True)
    assert torch.equal(
        load_images(numbered, [1], (4, 4), 1, how)[0], load_images(numbered, [1], (4, 4), 1, config())[0]
    )
    assert load_images(numbered, [], (4, 4), 1, how)[0].shape == (0, 1, 4, 4)


def test_load_images_that_are_corrupt(damaged: Source) -> None:
    refused(lambda: load_images(damaged, [0, 1], (4, 6), 1, config()), damaged.where(1), "on_corrupt=skip")
    skip = config(on_corrupt=OnCorrupt.SKIP)
    assert load_images(damaged, [0, 1, 4], (4, 6), 1, skip)[0].amax((1, 2, 3)).tolist() == [0, 3, 5]
