"""Where the images to be judged come from: a sampler, a source of pictures, or an ``.npz`` batch in ADM's layout.

All are streams: at no time is more than a batch of images in memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pra.config import DataConfig
from pra.data import Source, load_images, prepare
from pra.data.images import CorruptImage, header
from pra.data.loader import read_ahead
from pra.errors import PraError
from pra.sampling.batches import Batch


def prepared(
    source: Source,
    chosen: Sequence[int],
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    batch_size: int,
    places: range | None = None,
) -> Generator[Batch]:
    """Images ``chosen`` of a source, brought to the size and channels as for training, without augmentation.

    ``config.workers`` processes read ahead (:func:`pra.data.loader.read_ahead`): to be taken in a block of
    :func:`pra.data.loader.reading`. ``places`` are those in ``chosen`` that this process takes; all of them by default.

    Raises:
        PraError: as :func:`pra.data.load_images`.
    """
    places = range(len(chosen)) if places is None else places
    load = partial(load_images, source, size=size, channels=channels, config=config)
    parts = read_ahead(load, source, chosen[places.start : places.stop], batch_size, config.workers)
    with closing(parts):
        for start, (images, labels) in zip(places[::batch_size], parts, strict=True):
            yield Batch(images, labels, start)


Shape = tuple[tuple[int, int], int]
"""Height and width of pictures, and their channels: 1 where they are grey, else 3."""


def pictures(
    source: Source,
    chosen: Sequence[int],
    batch_size: int,
    places: range | None = None,
    shape: Shape | None = None,
    workers: int = 0,
) -> Generator[Batch]:
    """Images ``chosen`` of a folder as they are, without labels: finished pictures, all of one size.

    ``places`` are those in ``chosen`` that this process takes; all of them by default. ``shape`` is theirs, where
    :func:`common_shape` has been asked already. ``workers`` processes read ahead, as in :func:`prepared`.

    Raises:
        PraError: as :func:`common_shape`.
    """
    places = range(len(chosen)) if places is None else places
    load = partial(_load_pictures, source, shape or common_shape(source))
    parts = read_ahead(load, source, chosen[places.start : places.stop], batch_size, workers)
    with closing(parts):
        for start, (images,) in zip(places[::batch_size], parts, strict=True):
            yield Batch(images, None, start)


def _load_pictures(source: Source, shape: Shape, indices: Sequence[int]) -> tuple[Tensor]:
    size, channels = shape
    images = torch.empty((len(indices), channels, *size), dtype=torch.uint8)
    for row, index in enumerate(indices):
        where = source.where(index)
        with _finished(where):
            image = source.image(index)
            _check_size(where, picture_shape(image)[0], source.where(0), size)
            pixels = prepare(image, size, channels, DataConfig(source=source.name), None, where)
        images[row] = torch.from_numpy(pixels)
    return (images,)


def common_shape(source: Source) -> Shape:
    """The shape of all pictures of a folder, of which each may be stored as small as it can: one with colour is enough.

    Reads the heads of the files, not their pixels.

    Raises:
        PraError: pictures of different sizes, or one that cannot be read.
    """
    size, colour = None, False
    for index in range(len(source)):
        where = source.where(index)
        with _finished(where):
            own, channels = picture_shape(header(Path(where)))
        size, colour = size or own, colour or channels == 3
        _check_size(where, own, source.where(0), size)
    assert size is not None, "a source has images"
    return size, 3 if colour else 1


def picture_shape(image: Image.Image) -> Shape:
    """That of one picture."""
    return (image.height, image.width), 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def _check_size(where: str, size: tuple[int, int], first: str, expected: tuple[int, int]) -> None:
    if size != expected:
        raise PraError(
            f"{where} is {size[0]}x{size[1]} pixels (height x width) and {first} {expected[0]}x{expected[1]}; "
            "generated pictures have one size: bring them to it first"
        )


@contextmanager
def _finished(where: str) -> Iterator[None]:
    """None of the pictures that are judged can be passed over as in training."""
    try:
        yield
    except CorruptImage as error:
        raise PraError(f"{where}: {error.problem}; make this picture anew, or remove it") from None


def spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` indices, evenly: sources are often in order of their classes."""
    return [place * count // chosen for place in range(chosen)]


def labels_like(source: Source, count: int) -> Tensor:
    """``count`` labels as frequent as in a source, int64 ``(count,)``: those of images spread evenly over it."""
    return torch.from_numpy(source.labels[spread(len(source), count)])
