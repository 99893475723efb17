"""Training samples in an order that is a function of the seed, and batches of them from worker processes."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pra.config import DataConfig, Fit, OnCorrupt
from pra.data.images import CorruptImage
from pra.data.prepare import prepare
from pra.data.source import Source, Streamed
from pra.errors import PraError
from pra.method import noise
from pra.method.noise import Purpose
from pra.utils.signals import STOPS

PIECE = 32
"""Images that a worker reads at a time: whole batches for an evaluation would fill the shared memory."""

WORTH_A_WORKER = 512
"""Fewer images than this are read faster without another process."""

K = TypeVar("K")
V = TypeVar("V")


class Sample(NamedTuple):
    """One training sample: ``image`` is uint8 ``(C, H, W)``, ``index`` the global sample index.

    ``source_index`` is the image's place in the source, and ``skipped`` the number of corrupt images before it.
    """

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index(), which a sample does not need
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

    Epoch ``g // n`` goes through all ``n`` images in its own order (for a stream: as far as reading forward allows).
    Order, crops and flips depend on ``seed`` and ``g`` alone, so any part of the sequence can be made again anywhere.
    """

    def __init__(self, source: Source, size: tuple[int, int], channels: int, config: DataConfig, seed: int) -> None:
        self.source, self.size, self.channels, self.config, self.seed = source, size, channels, config, seed
        self._orders: dict[int, Tensor] = {}

    def source_index(self, g: int) -> int:
        """Return the place in the source of sample ``g``; ``on_corrupt=skip`` may take another instead."""
        return next(self._candidates(g))

    def __getitem__(self, g: int) -> Sample:
        """Return sample ``g``.

        Raises:
            PraError: the image is corrupt and ``on_corrupt`` is ``error``, all are corrupt, or it does not fit the
                model (:func:`pra.data.prepare`).
        """
        # Drawing numbers takes longer than preparing a small image.
        augmented = self.config.flip or self.config.fit is Fit.RANDOM_CROP
        key = noise.keys(self.seed, torch.tensor(g)) if augmented else None
        index, pixels, skipped = _prepared(self.source, self._candidates(g), self.size, self.channels, self.config, key)
        return Sample(torch.from_numpy(pixels), int(self.source.labels[index]), g, index, skipped)

    def _candidates(self, g: int) -> Iterator[int]:
        """Return source indices from place ``g`` of its epoch once around."""
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
    """Yield samples ``start, start + 1, ...`` in batches, without end or up to ``stop`` (the last may be smaller).

    ``config.workers`` processes prepare batches ahead, and change nothing else; closing the iterator ends them. With
    ``pin_memory`` copies to a GPU do not block. Errors are those of ``TrainingSet[g]``, also in a worker.
    """
    starts = itertools.count(start, batch_size) if stop is None else range(start, stop, batch_size)
    blocks = (range(s, s + batch_size if stop is None else min(s + batch_size, stop)) for s in starts)
    source, workers = dataset.source, dataset.config.workers
    if isinstance(source, Streamed) and workers > source.lanes:
        problem = f"{source.name} can be read at {source.lanes} place(s) at once"
        fix = "Shards that `pra data pack` makes can be read by any number"
        warnings.warn(f"{problem}: of {workers} data.workers {source.lanes} are started. {fix}", stacklevel=2)
        workers = source.lanes
    return from_workers(functools.partial(_batch, dataset), blocks, workers, pin_memory=pin_memory)


def _batch(dataset: TrainingSet, block: range) -> Batch:
    images, labels, indices, _, skipped = zip(*(dataset[g] for g in block), strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), sum(skipped))


def from_workers(work: Callable[[K], V], items: Iterable[K], workers: int, pin_memory: bool = False) -> Generator[V]:
    """Yield ``work(item)`` for each item, in order, done ahead by ``workers`` processes (0: in this one).

    ``work`` can be pickled, ``items`` may have no end. The processes end with the iterator. A PraError of ``work``
    arrives here, and in :func:`reading` the death of a worker is one.
    """
    loader: DataLoader[V | PraError] = DataLoader(
        _Guarded(work),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the default would draw from the global generator
    )
    stream: Any = iter(loader)
    try:
        for result in stream:
            if isinstance(result, PraError):
                raise result
            yield result
    finally:
        if workers:  # the traceback of an error keeps the stream, and its workers would keep this process
            stream._shutdown_workers()


@contextmanager
def reading(stream: Generator[V]) -> Iterator[Generator[V]]:
    """Take what worker processes read, and end them with the block: a kept exception would keep them alive.

    Explain what torch raises, wherever this process is, when a worker dies.
    """
    try:
        with closing(stream):
            yield stream
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).split(". ")[0].rstrip(".")
        raise PraError(
            f"a process that prepares data has died ({reason}), most likely for lack of memory or shared memory "
            "(/dev/shm). Use fewer processes (data.workers, or --workers), or give the machine or the container more",
            "lost",
        ) from None


def read_ahead(
    load: Callable[[Sequence[int]], tuple[Tensor, ...]],
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
) -> Generator[tuple[Tensor, ...]]:
    """Yield ``load(indices)``, tensors with a row each, a batch at a time, in the order of ``indices``.

    At most ``workers`` processes read ahead: none for few images, one for a stream. ``load`` can be pickled. Use it in
    a block of :func:`reading`.
    """
    pieces = [blocks(batch, PIECE) for batch in blocks(indices, batch_size)]
    workers = in_order(source, min(workers, len(indices) // WORTH_A_WORKER))
    with closing(from_workers(load, itertools.chain.from_iterable(pieces), workers)) as stream:
        for batch in pieces:
            parts = itertools.islice(stream, len(batch))
            yield tuple(torch.cat(column) for column in zip(*parts, strict=True))


def blocks(items: Sequence[K], size: int) -> list[Sequence[K]]:
    """Cut a sequence into parts of ``size`` items; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_order(source: Source, workers: int) -> int:
    """Return how many workers can share reading a source from front to back: at most one for a stream."""
    return min(workers, 1) if isinstance(source, Streamed) else workers


def load_images(
    source: Source, indices: Sequence[int], size: tuple[int, int], channels: int, config: DataConfig
) -> tuple[Tensor, Tensor]:
    """Return images uint8 ``(B, C, H, W)``, without augmentation, and labels int64 ``(B,)``.

    With ``on_corrupt=skip`` the next readable image replaces a corrupt one. Errors are those of ``TrainingSet[g]``.
    """
    images = torch.empty((len(indices), channels, *size), dtype=torch.uint8)
    labels = torch.empty(len(indices), dtype=torch.int64)
    for row, wanted in enumerate(indices):
        candidates = ((wanted + passed) % len(source) for passed in range(len(source)))
        index, pixels, _ = _prepared(source, candidates, size, channels, config, None)
        images[row] = torch.from_numpy(pixels)
        labels[row] = int(source.labels[index])
    return images, labels


class _Guarded(Dataset[Any]):
    """Returns a PraError instead of raising it: a DataLoader would put a worker's traceback into its message."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, item: Any) -> Any:
        try:
            return self._work(item)
        except PraError as error:
            return error


def _unchanged(result: V) -> V:
    return result


def _prepared(
    source: Source,
    candidates: Iterable[int],
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    key: Tensor | None,
) -> tuple[int, npt.NDArray[np.uint8], int]:
    """Return the first candidate that can be used, its pixels as of ``prepare``, and the number of those before it."""
    for skipped, index in enumerate(candidates):
        try:
            return index, prepare(source.image(index), size, channels, config, key, source.where(index)), skipped
        except CorruptImage as error:
            if config.on_corrupt is OnCorrupt.ERROR:
                raise
            problem = error.problem
    raise none_readable(source, len(source), f"{source.where(index)}: {problem}")


def none_readable(source: Source, tried: int, example: str) -> PraError:
    """Return the error for a source of which no image that was tried can be read."""
    problem = f"none of the {tried} images can be read (for example {example})"
    return PraError(f"{source.name}: {problem}. Check the data", "unreadable", name=source.name)


def _begin_worker(worker: int) -> None:
    # Terminals and job schedulers signal all processes: the main one decides when its workers stop.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose main process was killed: from Python 3.14 on, torch watches a fork server instead."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)
