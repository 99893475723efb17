"""Training samples in an order that is a function of the seed, and batches of them from worker processes."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import itertools
import multiprocessing
import os
import queue
import random
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pra.config import DataConfig, Fit, OnCorrupt
from pra.data.images import CorruptImage
from pra.data.prepare import prepare
from pra.data.source import Source, Streamed
from pra.errors import PraError, reason_of
from pra.method import noise
from pra.method.noise import Purpose
from pra.utils.signals import STOPS, deferred

PIECE = 32
"""Images that a worker reads at a time: whole batches for an evaluation would fill the shared memory."""

WORTH_A_WORKER = 512
"""Fewer images than this are read faster without another process."""

AHEAD = 2
"""Items that each worker is asked for before the first is taken."""

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
"""Errors of a machine, or of its limits, that has too little for so many processes."""

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
        index, image, skipped = _readable(self.source, self._candidates(g), self.config.on_corrupt)
        # Drawing numbers takes longer than preparing a small image.
        augmented = self.config.flip or self.config.fit is Fit.RANDOM_CROP
        key = noise.keys(self.seed, torch.tensor(g)) if augmented else None
        pixels = prepare(image, self.size, self.channels, self.config, key, self.source.where(index))
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
    work = functools.partial(_batch, dataset)
    if not pin_memory:
        return from_workers(work, blocks, workers)
    return from_workers(work, blocks, workers, functools.partial(_pinned, torch.cuda.current_device()))


def _batch(dataset: TrainingSet, block: range) -> Batch:
    images, labels, indices, _, skipped = zip(*(dataset[g] for g in block), strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), sum(skipped))


def _pinned(gpu: int, batch: Batch) -> Batch:
    with torch.cuda.device(gpu):  # a thread begins on the first GPU, and would take memory there
        return Batch(batch.images.pin_memory(), batch.labels.pin_memory(), batch.indices.pin_memory(), batch.skipped)


def from_workers(
    work: Callable[[K], V], items: Iterable[K], workers: int, arrive: Callable[[V], V] | None = None
) -> Generator[V]:
    """Yield ``work(item)`` for each item, in order, done ahead by ``workers`` processes (0: in this one).

    ``work`` can be pickled, ``items`` may have no end, and ``arrive``, if given, is applied to each result here, in a
    thread of each worker. The processes end with the iterator, whatever they are at. Close it: the traceback of a kept
    exception would keep it.

    Not torch's DataLoader: it loses a result that cannot be pickled (a full /dev/shm, an exception's local class) and
    waits for it for ever, and its workers, which ignore SIGTERM, keep a process from ending.

    Raises:
        PraError: one of ``work``; or a worker has died, or has too little memory, shared memory or open files.
        Exception: of ``work``, as it was; one of a worker has the worker's traceback in a note.
    """
    if not workers:
        yield from (work(item) if arrive is None else arrive(work(item)) for item in items)
        return
    with closing(_Workers()) as team:
        team.start(work, workers, arrive)
        asked: deque[_Worker] = deque()
        for item, worker in zip(items, itertools.cycle(team.workers), strict=False):
            worker.ask(item)
            asked.append(worker)
            if len(asked) > AHEAD * workers:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()


class _Workers:
    """Processes that work ahead. :meth:`close` ends them; so does the end of this process."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        atexit.register(self.close)  # before multiprocessing's, which waits for children that ignore its signal

    def start(self, work: Callable[[Any], Any], count: int, arrive: Callable[[Any], Any] | None) -> None:
        with deferred():  # Python swallows what a handler raises in the hooks of a fork
            try:
                for number in range(count):
                    self.workers.append(_Worker(work, number, arrive))
            except OSError as error:
                raise _too_little(error) if _is_scarce(error) else error from None
            for worker in self.workers:  # no thread while a process forks
                worker.thread.start()

    def close(self) -> None:
        atexit.unregister(self.close)
        if not self.workers:  # closed by atexit: a generator that is left may close them again, and signals are gone
            return
        with deferred():
            for worker in self.workers:
                worker.process.kill()  # it has nothing to save, and may be stuck
            for worker in self.workers:
                worker.process.join()
                if worker.thread.is_alive():
                    worker.thread.join()
                worker.connection.close()
            self.workers.clear()


class _Worker:
    """A process that works, and a thread here that takes its results, so that it need not wait."""

    def __init__(self, work: Callable[[Any], Any], number: int, arrive: Callable[[Any], Any] | None) -> None:
        self.arrive, self.results = arrive, queue.SimpleQueue[Any]()
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(work, number, theirs), daemon=True)
        with theirs:  # closed here, the worker has the only copy: its death ends what is read
            self.process.start()
        self.thread = threading.Thread(target=self._take, daemon=True)

    def ask(self, item: Any) -> None:
        with contextlib.suppress(ConnectionError):  # a dead worker: the thread says why
            self.connection.send(item)

    def result(self) -> Any:
        """Return the result of the next item, or raise the exception that came instead."""
        found = self.results.get()
        if isinstance(found, Exception):
            raise found
        return found

    def _take(self) -> None:
        try:
            while self.connection in wait((self.connection, self.process.sentinel)):
                result = self.connection.recv()
                if self.arrive is not None and not isinstance(result, Exception):
                    result = self.arrive(result)
                self.results.put(result)
        except Exception as error:  # of many classes, where no file descriptor is left for a tensor
            if not wait((self.process.sentinel,), timeout=1):
                self.results.put(_too_little(error))
                return
        self.results.put(self._death())

    def _death(self) -> PraError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if how in ("by SIGKILL", "by SIGBUS"):
            return _too_little(f"ended {how}")
        fix = "See what it says above, or read the data in this process (0 workers) to see its error"
        return PraError(f"a process that prepares data has ended {how}. {fix}", "lost")


def _is_scarce(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SCARCE)


def _too_little(reason: object) -> PraError:
    return PraError(
        f"a process that prepares data has died ({reason_of(reason)}), most likely for lack of memory, of shared "
        "memory (/dev/shm) or of open files. Use fewer processes (data.workers, or --workers), or give the machine or "
        "the container more (docker run --shm-size, ulimit -n)",
        "lost",
    )


def _serve(work: Callable[[Any], Any], number: int, connection: Connection) -> None:
    """Work in a process of its own, until the main process ends it."""
    # Terminals and job schedulers signal all processes: the main one decides when its workers stop.
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # of a user's source; forks would draw alike
        seed(number)
    with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone
        while True:
            connection.send_bytes(_answer(work, connection.recv()))


def _answer(work: Callable[[K], V], item: K) -> memoryview:
    """Return the pickled result, or the exception in its place. Tensors are in shared memory."""
    result: V | Exception
    try:
        result = work(item)
    except PraError as error:
        result = error
    except Exception as error:
        error.add_note(f"In a process that prepares data:\n{traceback.format_exc()}")
        result = _too_little(error) if _is_scarce(error) else error
    try:
        answer = ForkingPickler.dumps(result)
        if isinstance(result, Exception):
            ForkingPickler.loads(answer)
        return answer
    except Exception as error:
        if not isinstance(result, Exception):
            return ForkingPickler.dumps(_too_little(error))
        other = RuntimeError(f"{type(result).__name__}: {result}")  # a local class, or one that takes other arguments
        other.__notes__ = getattr(result, "__notes__", [])
        return ForkingPickler.dumps(other)


def read_ahead(
    load: Callable[[Sequence[int]], tuple[Tensor, ...]],
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
) -> Generator[tuple[Tensor, ...]]:
    """Yield ``load(indices)``, tensors with a row each, a batch at a time, in the order of ``indices``.

    At most ``workers`` processes read ahead: none for few images, one for a stream. ``load`` can be pickled.
    Close it.
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
        index, image, _ = _readable(source, candidates, config.on_corrupt)
        images[row] = torch.from_numpy(prepare(image, size, channels, config, None, source.where(index)))
        labels[row] = int(source.labels[index])
    return images, labels


def _readable(source: Source, candidates: Iterable[int], policy: OnCorrupt) -> tuple[int, Image.Image, int]:
    """Return the first candidate that can be read, its image, and the number of those before it."""
    for skipped, index in enumerate(candidates):
        try:
            return index, source.image(index), skipped
        except CorruptImage as error:
            # An image that could not be opened for want of file descriptors is not corrupt: it must not be left out.
            if policy is OnCorrupt.ERROR or _is_scarce(error.__cause__):
                raise
    raise none_readable(source, len(source), source.where(index))


def none_readable(source: Source, tried: int, example: str) -> PraError:
    """Return the error for a source of which no image that was tried can be read."""
    problem = f"none of the {tried} images can be read (for example {example})"
    return PraError(f"{source.name}: {problem}. Check the data", "unreadable", name=source.name)


def _end_with_parent() -> None:
    """End a worker whose main process was killed: a worker at work does not see the pipe close."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)
