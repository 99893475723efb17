"""Streams of images to be judged, from sources and folders of pictures. Only a batch is in memory at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pra.config import DataConfig, OnCorrupt
from pra.data import Source, load_images
from pra.data.images import CorruptImage, header
from pra.data.loader import one_caption, read_ahead
from pra.errors import PraError
from pra.models.condition import Row
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
    row: Row | None = None,
) -> Generator[Batch]:
    """Yield images ``chosen`` of a source, prepared as for training without augmentation.

    ``places`` are those in ``chosen`` that this process takes, by default all. With ``row``, of a model's condition,
    labels are rows with captions. ``config.workers`` processes read ahead: close it.
    """
    places = range(len(chosen)) if places is None else places
    load = partial(load_images, source, size=size, channels=channels, config=config, row=row)
    with closing(read_ahead(load, source, chosen[places.start : places.stop], batch_size, config.workers)) as parts:
        for start, (images, labels) in zip(places[::batch_size], parts, strict=True):
            yield Batch(images, labels, start)


def pictures(
    source: Source, chosen: Sequence[int], shape: Shape, batch_size: int, places: range | None = None, workers: int = 0
) -> Generator[Batch]:
    """Yield finished pictures of a folder as they are, without labels; arguments as :func:`prepared`.

    ``shape`` is the :func:`common_shape` of the folder.
    """
    config = DataConfig(source=source.name, workers=workers)
    with _finished(), closing(prepared(source, chosen, *shape, config, batch_size, places)) as batches:
        for batch in batches:
            yield batch._replace(labels=None)


def common_shape(source: Source) -> Shape:
    """Return the shape of all pictures of a folder, from the files' headers; colour if any picture has colour.

    Refuse pictures of different sizes, or one that cannot be read.
    """
    with _finished():
        size, channels = picture_shape(header(Path(source.where(0))))
        for index in range(1, len(source)):
            where = source.where(index)
            own, colours = picture_shape(header(Path(where)))
            if own != size:
                first = f"{source.where(0)} is {size[0]}x{size[1]}"
                problem = f"{where} is {own[0]}x{own[1]} pixels (height x width), {first}"
                raise PraError(f"{problem}. Bring the pictures to one size", "mismatch", path=where)
            channels = max(channels, colours)
    return size, channels


def picture_shape(image: Image.Image) -> Shape:
    """Return the shape of one picture."""
    return (image.height, image.width), 1 if image.mode in ("1", "L") or image.mode.startswith("I") else 3


@contextmanager
def _finished() -> Iterator[None]:
    """Pictures that are judged cannot be skipped as in training."""
    try:
        yield
    except CorruptImage as error:
        path, problem = error.fields["where"], error.problem
        raise PraError(f"{path}: {problem}. Replace or remove this picture", "unreadable", path=path) from None


def spread(count: int, chosen: int) -> list[int]:
    """Return ``chosen`` of ``count`` indices, evenly: sources are often in order of their classes."""
    return [place * count // chosen for place in range(chosen)]


def captions_like(source: Source, count: int, on_caption: OnCorrupt) -> tuple[list[int], list[str]]:
    """Return the places of ``count`` images spread evenly over a source, and a caption of each.

    Under ``OnCorrupt.SKIP`` the next image replaces one without a caption; else that is an error, as in training.
    """
    places, captions, total = list[int](), list[str](), len(source)
    for place, first in enumerate(spread(total, count)):
        for passed in range(total):
            index = (first + passed) % total
            try:
                captions.append(one_caption(source, index, 0, place))
            except CorruptImage:
                if on_caption is OnCorrupt.ERROR or passed == total - 1:
                    raise
            else:
                places.append(index)
                break
    return places, captions


def labels_like(source: Source, count: int) -> Tensor:
    """Return ``count`` labels as frequent as in a source, int64 ``(count,)``: those of images spread evenly over it."""
    return torch.from_numpy(source.labels[spread(len(source), count)])
