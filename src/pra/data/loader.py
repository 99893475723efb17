"""Training samples in an order that is a function of the seed, and batches of them from worker processes."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pra.config import DataConfig, Fit, OnCorrupt
from pra.data.images import CorruptImage
from pra.data.prepare import prepare
from pra.data.source import Source, Streamed
from pra.errors import PraError
from pra.method import noise
from pra.method.noise import Purpose

PIECE = 32
"""Images that a worker reads ahead at a time: whole batches for an evaluation would fill the shared memory."""

WORTH_A_WORKER = 512
"""Images for which it is worth while to start another process."""

K = TypeVar("K")
V = TypeVar("V")


class Sample(NamedTuple):
    """One training sample: ``image`` is uint8 ``(C, H, W)``, ``index`` the global sample index.

    ``source_index`` is the image's place in the source, and ``skipped`` the number of corrupt images passed
    over to find it.
    """

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index(), which a sample has no use for
    source_index: int
    skipped: int


class Batch(NamedTuple):
    """``images`` uint8 ``(B, C, H, W)``; ``labels`` and ``indices`` (global sample indices) int64 ``(B,)``.

    ``skipped`` is the total over the samples.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    skipped: int


class TrainingSet(Dataset[Sample]):
    """The endless sequence of training samples, by global sample index ``g = 0, 1, 2, ...``.

    Epoch ``g // n`` goes through all ``n`` images in an order of its own (a stream's as far as it can be read so).
    Order, crops and flips depend on ``seed`` and ``g`` alone, so that any part of the sequence can be made again
    anywhere.
    """

    def __init__(self, source: Source, size: tuple[int, int], channels: int, config: DataConfig, seed: int) -> None:
        self.source = source
        self.size = size
        self.channels = channels
        self.config = config
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def source_index(self, g: int) -> int:
        """The place in the source of sample ``g``; with ``on_corrupt=skip`` another may be taken instead."""
        return next(self._candidates(g))

    def __getitem__(self, g: int) -> Sample:
        """Sample ``g``.

        Raises:
            PraError: the image is corrupt and ``on_corrupt`` is ``error``, or all images are; or it does not
                suit the model's size (see :func:`pra.data.prepare`).
        """
        index, image, skipped = _readable(self.source, self._candidates(g), self.config.on_corrupt)
        # Drawing numbers takes longer than preparing a small image.
        augmented = self.config.flip or self.config.fit is Fit.RANDOM_CROP
        key = noise.keys(self.seed, torch.tensor(g)) if augmented else None
        pixels = prepare(image, self.size, self.channels, self.config, key, self.source.where(index))
        return Sample(torch.from_numpy(pixels), int(self.source.labels[index]), g, index, skipped)

    def _candidates(self, g: int) -> Iterator[int]:
        """Source indices from place ``g`` of its epoch once around."""
        assert g >= 0
        count = len(self.source)
        epoch, place = divmod(g, count)
        order = self._order(epoch)
        return (int(order[(place + passed) % count]) for passed in range(count))

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            key = noise.fold(noise.keys(self.seed, torch.tensor(epoch)), Purpose.SHUFFLE)
            order = noise.permutation(key, len(self.source))
            if isinstance(self.source, Streamed):
                order = self.source.arranged(order, epoch * len(self.source))
            # A batch may straddle two epochs; older orders are not needed again.
            previous = {e: known for e, known in self._orders.items() if e == epoch - 1}
            self._orders = previous | {epoch: order}
        return self._orders[epoch]


def batches(
    dataset: TrainingSet, start: int, batch_size: int, stop: int | None = None, pin_memory: bool = False
) -> Generator[Batch]:
    """Samples ``start, start + 1, ...`` in batches; without end, or up to ``stop`` (the last may be smaller).

    ``config.workers`` processes live as long as the iterator, across epochs, and prepare batches ahead. What
    they yield does not depend on their number. Who stops early closes the iterator: it ends the processes. With
    ``pin_memory`` copies to a GPU do not block.

    Raises:
        PraError: as ``TrainingSet[g]``, also out of a worker.
    """
    starts = itertools.count(start, batch_size) if stop is None else range(start, stop, batch_size)
    blocks = (range(s, s + batch_size if stop is None else min(s + batch_size, stop)) for s in starts)
    workers = _readers(dataset.source, dataset.config.workers)
    return from_workers(_Batches(dataset), blocks, workers, pin_memory=pin_memory)


def from_workers(work: Callable[[K], V], items: Iterable[K], workers: int, pin_memory: bool = False) -> Generator[V]:
    """``work(item)`` for each item, in order, done ahead by ``workers`` processes (0: here, when it is asked for).

    Args:
        work: can be pickled.
        items: may have no end.
        workers: processes, which end with the iterator.
        pin_memory: of tensors in the results, for copies to the GPU that do not block.

    Raises:
        PraError: as ``work``, also out of a worker; or a worker was killed.
    """
    loader: DataLoader[V | PraError] = DataLoader(
        _Guarded(work),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader draws from the global one
    )
    stream: Any = iter(loader)
    try:
        with workers_alive():
            for result in stream:
                if isinstance(result, PraError):
                    raise result
                yield result
    finally:
        if workers:  # the traceback of an error keeps the stream, and its workers would keep this process
            stream._shutdown_workers()


@contextmanager
def workers_alive() -> Iterator[None]:
    """A block in which workers are busy: torch interrupts it wherever it is when one of them dies.

    Raises:
        PraError: a worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PraError(
            f"a process that prepares data has died ({str(error).split('. ')[0].rstrip('.')}), most likely for lack of "
            "memory or of shared memory (/dev/shm): use fewer (data.workers, or --workers), or give the machine or the "
            "container more"
        ) from None


@contextmanager
def reading(stream: Generator[V]) -> Iterator[Generator[V]]:
    """A block that takes what worker processes read. They end with it: left to the garbage collector, they outlive an
    exception that somebody keeps, and then the process cannot end, as they ignore its SIGTERM.

    Raises:
        PraError: a worker was killed.
    """
    with workers_alive(), closing(stream):
        yield stream


def read_ahead(
    load: Callable[[Sequence[int]], tuple[Tensor, ...]],
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
) -> Generator[tuple[Tensor, ...]]:
    """``load(indices)`` of images of a source, a batch at a time, read ahead by worker processes.

    What comes does not depend on their number. To be taken in a block of :func:`reading`.

    Args:
        load: what is wanted of some images: tensors with a row for each. Can be pickled.
        source: of the images.
        indices: theirs, in the order in which they come.
        batch_size: images at a time; the last may be fewer.
        workers: processes at most: few images are read here, and a stream by one.

    Raises:
        PraError: as ``load``, also out of a worker; or a worker was killed.
    """
    starts = range(0, len(indices), batch_size)
    batches = [indices[start : start + batch_size] for start in starts]
    pieces = (batch[start : start + PIECE] for batch in batches for start in range(0, len(batch), PIECE))
    workers = in_order(source, min(workers, len(indices) // WORTH_A_WORKER))
    with closing(from_workers(load, pieces, workers)) as stream:
        for batch in batches:
            parts = itertools.islice(stream, math.ceil(len(batch) / PIECE))
            yield tuple(torch.cat(column) for column in zip(*parts, strict=True))


def in_order(source: Source, workers: int) -> int:
    """How many of so many workers can share the reading of a source from front to back: who reads a stream from its
    middle reads all before, so that one does it."""
    return min(workers, 1) if isinstance(source, Streamed) else workers


def load_images(
    source: Source, indices: Sequence[int], size: tuple[int, int], channels: int, config: DataConfig
) -> tuple[Tensor, Tensor]:
    """Images ``indices`` of the source, without augmentation.

    Returns:
        Images uint8 ``(B, C, H, W)`` and labels int64 ``(B,)``. With ``on_corrupt=skip`` the next readable
        image of the source stands in for a corrupt one.

    Raises:
        PraError: as ``TrainingSet[g]``.
    """
    images = torch.empty((len(indices), channels, *size), dtype=torch.uint8)
    labels = torch.empty(len(indices), dtype=torch.int64)
    for row, wanted in enumerate(indices):
        candidates = ((wanted + passed) % len(source) for passed in range(len(source)))
        index, image, _ = _readable(source, candidates, config.on_corrupt)
        images[row] = torch.from_numpy(prepare(image, size, channels, config, None, source.where(index)))
        labels[row] = int(source.labels[index])
    return images, labels


def _readers(source: Source, workers: int) -> int:
    """How many of the workers that were asked for can share the reading of a source."""
    if not isinstance(source, Streamed) or workers <= source.lanes:
        return workers
    warnings.warn(
        f"{source.name} can be read at {source.lanes} place(s) at once: of {workers} data.workers {source.lanes} are "
        "started; `pra data pack` makes shards of it that any number can read",
        stacklevel=3,
    )
    return source.lanes


class _Batches:
    """Whole batches by their range of indices."""

    def __init__(self, samples: TrainingSet) -> None:
        self._samples = samples

    def __call__(self, block: range) -> Batch:
        samples = [self._samples[g] for g in block]
        return Batch(
            torch.stack([sample.image for sample in samples]),
            torch.tensor([sample.label for sample in samples]),
            torch.tensor([sample.index for sample in samples]),
            sum(sample.skipped for sample in samples),
        )


class _Guarded(Dataset[Any]):
    """A PraError is returned, not raised: a DataLoader would put a worker's traceback into its message."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._work(item)
        except PraError as error:
            return error


def _as_it_is(result: V) -> V:
    return result


def _readable(source: Source, candidates: Iterable[int], policy: OnCorrupt) -> tuple[int, Image.Image, int]:
    """The first candidate that can be read, its image, and the number of those before it."""
    for skipped, index in enumerate(candidates):
        try:
            return index, source.image(index), skipped
        except CorruptImage:
            if policy is OnCorrupt.ERROR:
                raise
    raise PraError(
        f"none of the {len(source)} images of {source.name!r} can be read "
        f"(for example {source.where(index)}); check the data, or give another source"
    )


def _begin_worker(worker: int) -> None:
    """Terminals and job schedulers signal all processes: the main one decides when its workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A main process that was killed has stopped nothing. torch's workers look for that too, but at the process that
    forked them, which is another one where Python starts processes by a server, as it does from 3.14 on."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)
