"""Streams of images to be judged, from sources and folders of pictures. Only a batch is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
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

Shape = tuple[tuple[int, int], int]
"""Height and width of pictures, and their channels: 1 for grey ones, else 3."""


def prepared(
    source: Source,
    chosen: Sequence[int],
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    batch_size: int,
    places: range | None = None,
) -> Generator[Batch]:
    """Yield images ``chosen`` of a source, prepared as for training without augmentation.

    ``places`` are those in ``chosen`` that this process takes, by default all. ``config.workers`` processes read ahead:
    use it in a block of :func:`pra.data.loader.reading`.
    """
    load = partial(load_images, source, size=size, channels=channels, config=config)
    return _stream(load, source, chosen, batch_size, places, config.workers)


def pictures(
    source: Source,
    chosen: Sequence[int],
    batch_size: int,
    places: range | None = None,
    shape: Shape | None = None,
    workers: int = 0,
) -> Generator[Batch]:
    """Yield images ``chosen`` of a folder as they are, without labels: finished pictures of one size.

    ``shape`` is the :func:`common_shape`, where it is known already; ``places`` and ``workers`` as :func:`prepared`.
    """
    load = partial(_load_pictures, source, shape or common_shape(source))
    return _stream(load, source, chosen, batch_size, places, workers)


def _stream(
    load: Callable[[Sequence[int]], tuple[Tensor, ...]],
    source: Source,
    chosen: Sequence[int],
    batch_size: int,
    places: range | None,
    workers: int,
) -> Generator[Batch]:
    places = range(len(chosen)) if places is None else places
    parts = read_ahead(load, source, chosen[places.start : places.stop], batch_size, workers)
    with closing(parts):
        for start, (images, *labels) in zip(places[::batch_size], parts, strict=True):
            yield Batch(images, labels[0] if labels else None, start)


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
    """Return the shape of all pictures of a folder, from the heads of the files. One with colour is enough for colour.

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
    """Return the shape of one picture."""
    return (image.height, image.width), 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


def _check_size(where: str, size: tuple[int, int], first: str, expected: tuple[int, int]) -> None:
    if size != expected:
        sizes = f"{size[0]}x{size[1]} pixels (height x width), {first} is {expected[0]}x{expected[1]}"
        raise PraError(f"{where} is {sizes}. Bring the pictures to one size", "mismatch", path=where)


@contextmanager
def _finished(where: str) -> Iterator[None]:
    """Pictures that are judged cannot be skipped as in training."""
    try:
        yield
    except CorruptImage as error:
        raise PraError(f"{where}: {error.problem}. Replace or remove this picture", "unreadable", path=where) from None


def spread(count: int, chosen: int) -> list[int]:
    """Return ``chosen`` of ``count`` indices, evenly: sources are often in order of their classes."""
    return [place * count // chosen for place in range(chosen)]


def labels_like(source: Source, count: int) -> Tensor:
    """Return ``count`` labels as frequent as in a source, int64 ``(count,)``: those of images spread evenly over it."""
    return torch.from_numpy(source.labels[spread(len(source), count)])
