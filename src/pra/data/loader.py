"""Training samples in an order that is a function of the seed, and batches of them from worker processes."""

from __future__ import annotations

import atexit
import copyreg
import errno
import functools
import io
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pra.config import DataConfig, Fit, OnCorrupt
from pra.data.images import CorruptImage
from pra.data.prepare import prepare
from pra.data.source import Captioned, Source, Streamed
from pra.errors import PraError, reason_of
from pra.method import noise
from pra.method.noise import Purpose
from pra.models.condition import Row
from pra.utils.signals import STOPS, deferred

PIECE = 32
"""Images that a worker reads at a time: whole batches for an evaluation would fill the memory."""

WORTH_A_WORKER = 512
"""Fewer images than this are read faster without another process."""

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)
"""Errors of a machine whose memory or limits do not allow the number of processes."""

Label: TypeAlias = int | npt.NDArray[np.int64]

K = TypeVar("K")
V = TypeVar("V")


class Sample(NamedTuple):
    """One training sample: ``image`` is uint8 ``(C, H, W)``, ``index`` the global sample index.

    ``label`` is a class, or the row of a class and a caption (:data:`pra.models.condition.Row`).

    ``source_index`` is the image's place in the source, and ``skipped`` the number of corrupt images before it.
    """

    image: Tensor
    label: Label
    index: int  # type: ignore[assignment]  # hides tuple.index(), which a sample does not need
    source_index: int
    skipped: int


class Batch(NamedTuple):
    """``images`` uint8 ``(B, C, H, W)``; ``labels`` and ``indices`` (global sample indices) int64 ``(B,)``.

    ``labels`` are rows ``(B, 1 + L)`` where captions are read. ``skipped`` is the total over the samples.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    skipped: int

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.indices.pin_memory(), self.skipped)


class TrainingSet(Dataset[Sample]):
    """The endless sequence of training samples, by global sample index ``g = 0, 1, 2, ...``.

    Epoch ``g // n`` goes through all ``n`` images in its own order (for a stream: as far as reading forward allows).
    Order, crops, flips and captions depend on ``seed`` and ``g`` alone, so any part of the sequence can be made again
    anywhere. ``row`` belongs to the model's condition (:data:`Row`), if it reads captions.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        channels: int,
        config: DataConfig,
        seed: int,
        row: Row | None = None,
    ) -> None:
        self.source, self.size, self.channels, self.config, self.seed = source, size, channels, config, seed
        self.row = row
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
        tell = functools.partial(told, self.source, row=self.row, seed=self.seed, g=g)
        how = self.size, self.channels, self.config, key
        index, pixels, label, skipped = _prepared(self.source, self._candidates(g), tell, *how)
        return Sample(torch.from_numpy(pixels), label, g, index, skipped)

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
    told = torch.from_numpy(np.array(labels, np.int64))
    return Batch(torch.stack(images), told, torch.tensor(indices), sum(skipped))


def told(source: Source, index: int, row: Row | None, seed: int, g: int) -> Label:
    """Return the label of an image as a model takes it: its class, or a row with :func:`one_caption`."""
    label = int(source.labels[index])
    return label if row is None else row(label, one_caption(source, index, seed, g))


def one_caption(source: Source, index: int, seed: int, g: int) -> str:
    """Return one caption of an image; of several, the seed and ``g`` decide which."""
    assert isinstance(source, Captioned), "checked before: pra.data.source.check_captions"
    captions, place = source.captions(index), 0
    if len(captions) > 1:
        key = noise.fold(noise.keys(seed, torch.tensor(g)), Purpose.CAPTION)
        place = int(noise.uniform(key, 1) * len(captions))
    return captions[place]


def from_workers(work: Callable[[K], V], items: Iterable[K], workers: int, pin_memory: bool = False) -> Generator[V]:
    """Yield ``work(item)`` for each item, in order, done ahead by ``workers`` processes (0: in this one).

    ``work`` can be pickled, ``items`` may have no end. With ``pin_memory`` results have a method of that name. The
    processes end with the iterator, in the middle of their work. Close it: the traceback of a stored exception would
    keep it alive.

    Raises:
        PraError: one of ``work``; or a worker has died, or has too little memory or open files.
        Exception: any exception of ``work``; in a worker, its traceback is added as a note.
    """
    if not workers:
        for item in items:
            result: Any = work(item)
            yield result.pin_memory() if pin_memory else result
        return
    loader: DataLoader[Any] = DataLoader(
        _Packed(work),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the default would draw from the global generator
    )
    with ExitStack() as stack:
        with deferred():  # Python swallows what a handler raises in the hooks of a fork
            stream = _started(loader)
            end = functools.partial(_end, stream)
            atexit.register(end)  # before multiprocessing's own, which waits for children that ignore its signal
            stack.callback(atexit.unregister, end)
            stack.callback(end)
        try:
            for sent in stream:
                result = sent.opened() if isinstance(sent, _Parcel) else sent
                if isinstance(result, Exception):
                    raise result
                yield result
        except RuntimeError:
            if all(worker.is_alive() for worker in stream._workers):
                raise
            raise _death(stream) from None


def _started(loader: DataLoader[Any]) -> Any:
    """Start the workers of a loader; return its iterator, which notices a dead one when it waits for a result."""
    handler, before = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    try:
        stream = iter(loader)
    except OSError as error:
        for worker in multiprocessing.active_children():
            if worker not in before:
                worker.kill()
                worker.join()
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "_workers" in vars(half_made := frame.f_locals.get("self", loader)):
                half_made._shutdown = True  # else torch complains that it cannot end workers it has not started
        raise _too_little(error) if _is_scarce(error) else error from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)  # torch's handler raises anywhere, in a step or a save
    _watch(stream)
    return stream


def _watch(stream: Any) -> None:
    """Make the wait for a result end when a worker dies: it may have sent half a result, and still hold the lock."""
    reader, ends = stream._worker_result_queue._reader, [worker.sentinel for worker in stream._workers]

    def poll(timeout: float) -> bool:
        return reader in wait([reader, *ends], timeout)

    def read(handle: int, size: int) -> bytes:
        while not wait([handle], 0.1):
            if wait(ends, 0):
                raise queue.Empty  # torch then checks its workers
        return os.read(handle, min(size, 2**20))  # os.read allocates this much at every call

    reader._poll, reader._recv = poll, functools.partial(reader._recv, read=read)


def _end(stream: Any) -> None:
    """Kill the workers at once: they have nothing to save."""
    if stream._shutdown:  # by atexit: an unclosed generator ends later, when signals are gone
        return
    for worker in stream._workers:
        worker.kill()
    stream._shutdown_workers()


class _Packed(Dataset[Any]):
    """Does the work in a worker, and sends the result, or the exception in its place, as bytes.

    torch would send tensors through shared memory, which is small in containers, and exceptions as text. It would lose
    a result that it cannot pickle, and wait for it forever.
    """

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def __getitem__(self, item: Any) -> _Parcel:
        try:
            return _Parcel(_pickled(self._work(item)))
        except Exception as error:
            if not isinstance(error, PraError):
                error.add_note(f"In a process that prepares data:\n{traceback.format_exc()}")
            try:
                data = _pickled(_too_little(error) if _is_scarce(error) else error)
                pickle.loads(data)
            except Exception:  # a local class, or one that takes other arguments
                failure = RuntimeError(f"{type(error).__name__}: {error}")
                failure.__notes__ = getattr(error, "__notes__", [])
                data = _pickled(failure)
            return _Parcel(data)


class _Parcel:
    """The pickled result of a worker."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def opened(self) -> Any:
        return pickle.loads(self.data)

    def pin_memory(self) -> Any:
        """Open it in the thread in which torch pins memory, which calls this."""
        result = self.opened()
        return result if isinstance(result, Exception) else result.pin_memory()


def _pickled(value: Any) -> bytes:
    """Pickle tensors as arrays: torch itself would use shared memory, or write an archive."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | {Tensor: lambda tensor: (torch.from_numpy, (tensor.numpy(),))}
    pickler.dump(value)
    return buffer.getvalue()


def _death(stream: Any) -> PraError:
    """Explain the death of a worker."""
    codes = [worker.exitcode for worker in stream._workers if worker.exitcode]
    code = codes[0] if codes else 0
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    if how in ("by SIGKILL", "by SIGBUS"):
        return _too_little(f"ended {how}")
    fix = "See its output above, or read the data in this process (0 workers) to see its error"
    return PraError(f"a process that prepares data has ended {how}. {fix}", "lost")


def _is_scarce(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SCARCE)


def _too_little(reason: object) -> PraError:
    return PraError(
        f"a process that prepares data has died ({reason_of(reason)}), most likely for lack of memory or open files. "
        "Use fewer processes (data.workers, or --workers), or allow more (docker run --memory, ulimit -n)",
        "lost",
    )


def _begin_worker(worker: int) -> None:
    # Terminals and job schedulers signal all processes, but the main process decides when its workers stop.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose main process was killed: from Python 3.14 on, torch watches a fork server instead."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os._exit(1)


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
    source: Source,
    indices: Sequence[int],
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    row: Row | None = None,
) -> tuple[Tensor, Tensor]:
    """Return images uint8 ``(B, C, H, W)``, without augmentation, and labels int64 ``(B,)``.

    With a ``row`` labels are rows ``(B, 1 + L)``, of the same caption each time. With ``on_corrupt=skip`` the next
    readable image replaces a corrupt one. Errors are those of ``TrainingSet[g]``.
    """
    images = torch.empty((len(indices), channels, *size), dtype=torch.uint8)
    labels = []
    for place, wanted in enumerate(indices):
        candidates = ((wanted + passed) % len(source) for passed in range(len(source)))
        tell = functools.partial(told, source, row=row, seed=0, g=wanted)
        _, pixels, label, _ = _prepared(source, candidates, tell, size, channels, config, None)
        images[place] = torch.from_numpy(pixels)
        labels.append(label)
    return images, torch.from_numpy(np.array(labels, np.int64))


def _prepared(
    source: Source,
    candidates: Iterable[int],
    tell: Callable[[int], Label],
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    key: Tensor | None,
) -> tuple[int, npt.NDArray[np.uint8], Label, int]:
    """Return the first usable candidate, its pixels, its label, and the number of candidates skipped before it."""
    for skipped, index in enumerate(candidates):
        try:
            pixels = prepare(source.image(index), size, channels, config, key, source.where(index))
            return index, pixels, tell(index), skipped
        except CorruptImage as error:
            # Too many open files: the image itself is not corrupt, so do not leave it out.
            if getattr(config, error.setting) is OnCorrupt.ERROR or _is_scarce(error.__cause__):
                raise
            problem = error.problem
    raise none_readable(source, len(source), f"{source.where(index)}: {problem}")


def none_readable(source: Source, tried: int, example: str) -> PraError:
    """Return the error for a source whose images cannot be read."""
    problem = f"none of the {tried} images can be read (for example {example})"
    return PraError(f"{source.name}: {problem}. Check the data", "unreadable", name=source.name)
