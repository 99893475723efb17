"""Pictures, tars and small data sets for the tests of data."""

import dataclasses
import functools
import io
import struct
import tarfile

import numpy as np
import torch
from PIL import Image

from pra.config import DataConfig
from pra.data import TrainingSet, batches
from pra.data.survey import Range, Survey

PHOTOS = Survey(
    source="folder:photos",
    images=20_000,
    classes={"cats": 12_000, "dogs": 8_000},
    opened=500,
    width=Range(300, 1200, 4000),
    height=Range(200, 900, 3000),
    short_side=Range(200, 900, 3000),
    grey=3,
    transparent=0,
    square=20,
    corrupt=(),
    seconds_per_image=0.0,
)


def config(**changes):
    return dataclasses.replace(DataConfig(source=""), **changes)


def picture(height=12, width=10, seed=0, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def turned():
    """EXIF data that ask for a turn by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@functools.cache
def jpeg(seed=0):
    file = io.BytesIO()
    picture(seed=seed).save(file, "jpeg")
    return file.getvalue()


def same_jpeg(image, seed):
    return bool((np.asarray(image) == np.asarray(Image.open(io.BytesIO(jpeg(seed))))).all())


def tar_of(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def imagenet():
    """A tar of two class tars with two and one images, out of order, and files to ignore."""
    dogs = {f"n02_{i}.JPEG": jpeg(i) for i in (3, 4)} | {"._n02_3.JPEG": b"a Mac was here", "list.txt": b""}
    return tar_of({"n02.tar": tar_of(dogs), "README": b"", "n01.tar": tar_of({"n01_5.JPEG": jpeg(5)})})


def shard(*numbers, classes=3):
    """A tar of samples whose image has the seed ``number`` and whose class is ``number % classes``."""
    files = {}
    for number in numbers:
        label = {} if classes is None else {f"{number:04d}.cls": str(number % classes).encode()}
        files |= {f"{number:04d}.jpg": jpeg(number)} | label
    return tar_of(files)


def write_idx(folder, count=7, split="train"):
    """``count`` images of 4x6 whose pixels all hold the image's index; labels 0, 1, 2, 0, ..."""
    folder.mkdir(exist_ok=True)
    images = struct.pack(">4B3I", 0, 0, 8, 3, count, 4, 6) + np.arange(count, dtype=np.uint8).repeat(24).tobytes()
    labels = struct.pack(">4BI", 0, 0, 8, 1, count) + (np.arange(count) % 3).astype(np.uint8).tobytes()
    (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def write_parquet(path, numbers, **labels):
    """Rows whose image has the seed ``number``. ``labels`` are columns: the library's type, and a function of it."""
    import datasets

    kinds = {"image": datasets.Image()} | {name: kind for name, (kind, _) in labels.items()}
    columns = {"image": [{"bytes": jpeg(i), "path": None} for i in numbers]}
    columns |= {name: [value(i) for i in numbers] for name, (_, value) in labels.items()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(str(path))


def same(a, b):
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True))


def same_batches(one, other, start=0, stop=16, workers=0):
    """Check that the second source, begun at ``start``, yields the same as the first from there."""
    whole = list(batches(TrainingSet(one, (8, 8), 3, config(flip=True), seed=1), 0, 2, stop))
    rest = batches(TrainingSet(other, (8, 8), 3, config(flip=True, workers=workers), seed=1), start, 2, stop)
    assert all(same(expected, found) for expected, found in zip(whole[start // 2 :], rest, strict=True))


def noisy(path, size=(20, 20), mode="RGB", seed=0):
    """Noise, in which every pixel is coloured if the mode has colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


def flat(path, colour, mode="RGB", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
