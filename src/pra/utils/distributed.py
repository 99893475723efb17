"""Processes that share one command's work, as ``torchrun`` starts them; a single process is a world of one.

Other launchers than ``torchrun`` set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
"""

from __future__ import annotations

import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pra.errors import PraError, reason_of
from pra.utils.device import pick_device
from pra.utils.signals import ended_by_sigterm

T = TypeVar("T")
R = TypeVar("R")

LOST = "another process of this command has ended early; see its output"

LAUNCH = "Unset it, and start the processes with torchrun"
STEP, PATIENCE = timedelta(minutes=30), timedelta(days=1)
"""Timeouts: within a training step, and while one rank works for all. A rank that waits longer ends."""


@dataclass(frozen=True)
class World:
    """Rank ``rank`` of ``size`` processes, number ``local_rank`` on its machine.

    All ranks call the same methods in the same order, except :meth:`device` and :meth:`share`. The methods raise
    :class:`PraError` when another rank has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patient: Any = field(default=None, repr=False, compare=False)
    """torch's process group with the timeout :data:`PATIENCE`; the default group has :data:`STEP`."""
    store: Any = field(default=None, repr=False, compare=False)
    """torch's store, which these ranks alone use."""
    _failed_first: list[bool] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """Return the device of :func:`pick_device`; of several GPUs, this process's own unless named."""
        if self.size == 1 or name not in (None, "cuda") or not torch.cuda.is_available():
            return pick_device(name)
        if self.local_rank >= (count := torch.cuda.device_count()):
            message = f"process {self.local_rank}: this machine has {count} GPUs. Start {count} processes"
            raise PraError(message, code="unsupported", value=count)
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def share(self, count: int) -> range:
        """Return this rank's part of ``count`` items; parts are consecutive and disjoint."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def combine(self, value: T, how: Callable[[list[T]], R]) -> R:
        """Return ``how(values)`` of all ranks' values, computed on rank 0 and broadcast. Patient."""
        if self.size == 1:
            return how([value])
        values: list[Any] | None = [None] * self.size if self.is_first else None
        with self.together():
            dist.gather_object(value, values, group=self.patient)
        result: list[Any] = [None]
        if values is not None:
            values[0] = value  # not the pickled copy
            result = [how(values)]
        with self.together():
            dist.broadcast_object_list(result, group=self.patient)
        return result[0]  # type: ignore[no-any-return]

    def run_on_first(self, do: Callable[[], R]) -> R:
        """Run a function on rank 0 alone and return its result on every rank. Patient."""
        return self.combine(None, lambda _: do())

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a float tensor over the ranks, on its device."""
        return self._reduced(values, "SUM", None) / self.size

    def highest(self, value: int, patient: bool = False) -> int:
        """Return the largest of the ranks' values. Over gloo: no GPU is waited for."""
        return int(self._reduced(torch.tensor(value), "MAX", self.patient if patient else None))

    def _reduced(self, values: Tensor, how: str, group: Any) -> Tensor:
        if self.size == 1:
            return values
        found = values.clone()
        with self.together():
            dist.all_reduce(found, getattr(dist.ReduceOp, how), group=group)
        return found

    def barrier(self, patient: bool = False) -> None:
        """Wait for all ranks, up to :data:`PATIENCE` if ``patient``. If one has failed, the others end here."""
        self.highest(0, patient)

    def fails_first(self) -> bool:
        """Return whether this rank is the first to fail, which reports the error; call it before others notice."""
        if self.store is None:
            return True
        if not self._failed_first:  # asked once: soon the store's process may have ended
            try:
                with _hushed():
                    first = self.store.compare_set("pra/failed", "", str(self.rank)).decode()
                self._failed_first.append(first == str(self.rank))
            except RuntimeError:  # the store's process has ended, and has said why
                return False
        return self._failed_first[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block of torch's own collectives; only the loss of a rank becomes a :class:`PraError`."""
        try:
            yield
        except RuntimeError as error:
            lost = "gloo" in str(error) or isinstance(error, dist.DistError)  # gloo has no class
            if self.size == 1 or not lost:
                raise
            raise PraError(LOST, code="lost") from None

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run a block on one rank of each machine before the others: it fills the caches that they read."""
        if self.local_rank > 0:
            self.barrier(patient=True)
        yield
        if self.local_rank == 0:
            self.barrier(patient=True)


ALONE = World()


@contextmanager
def join() -> Iterator[World]:
    """Join the world that the environment describes: ``torchrun``'s variables, or this process alone.

    Only rank 0 warns. The first rank that fails raises its :class:`PraError` or ``OSError``; the others raise
    ``SystemExit(2)``, so one line is printed. Wrong variables, and ranks that do not find each other, are a PraError.
    """
    size = _size()
    if size == 1:
        yield ALONE
        return
    world = _rendezvous(variable("RANK", most=size - 1), size, variable("LOCAL_RANK"))
    with ended_by_sigterm():  # torchrun's signal after a failure: clean up silently
        try:
            with warnings.catch_warnings():
                if not world.is_first:
                    warnings.simplefilter("ignore")
                yield world
        except (PraError, OSError):
            # The first rank to fail reports at once: the others may work for hours before they notice.
            if not world.fails_first():
                raise SystemExit(2) from None
            raise
    dist.destroy_process_group()


def _rendezvous(rank: int, size: int, local_rank: int) -> World:
    from torch.distributed.rendezvous import rendezvous  # missing in some builds of torch

    patience = timedelta(seconds=variable("PRA_RENDEZVOUS_TIMEOUT", "300", least=1))
    try:
        with _hushed():
            store, _, _ = next(rendezvous("env://", timeout=patience))
            store = own_part(store, rank, size, patience)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.all_reduce(torch.zeros(()), group=patient)  # no rank ends while another still connects
        return World(rank, size, local_rank, patient, store)
    except (RuntimeError, ValueError, OSError) as error:
        address = ":".join(os.environ.get(name, f"(no {name})") for name in ("MASTER_ADDR", "MASTER_PORT"))
        problem = f"does not find the others at {address} ({reason_of(error)})"
        fix = "Start all with torchrun, at an address that every machine reaches (PRA_RENDEZVOUS_TIMEOUT: seconds)"
        message = f"process {rank} of {size} {problem}. {fix}"
        raise PraError(message, code="unreachable", address=address) from None


def own_part(store: Any, rank: int, size: int, patience: timedelta) -> Any:
    """Return these processes' part of the store, when all of them are there.

    torchrun's store outlives a restart with all its old entries, and each machine counts its restarts for itself. So
    each rank announces itself under a random name, and rank 0 answers that name.

    Raises RuntimeError after ``patience``.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    name = uuid.uuid4().hex
    if rank:
        store.set(f"pra/name-{rank}", name)
        store.wait([f"pra/answer-{name}"], patience)
        part = PrefixStore(store.get(f"pra/answer-{name}").decode(), store)
        part.set(f"here-{rank}", "")
        part.wait(["here-0"], patience)
        return part
    part, missing, end = PrefixStore(name, store), set(range(1, size)), time.monotonic() + patience.total_seconds()
    while missing:
        for other in sorted(missing):
            if part.check([f"here-{other}"]):
                missing.remove(other)
            elif store.check([f"pra/name-{other}"]):  # perhaps of a rank before the restart: ask again
                store.set(f"pra/answer-{store.get(f'pra/name-{other}').decode()}", name)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"{len(missing)} processes are missing, such as rank {min(missing)}")
        time.sleep(0.02)
    part.set("here-0", "")
    return part


@contextmanager
def _hushed() -> Iterator[None]:
    """Silence C++'s pages on standard error: errors are raised as well."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        for descriptor in (kept, nowhere):
            os.close(descriptor)


def _size() -> int:
    for name in () if "WORLD_SIZE" in os.environ else ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") != "1":
            problem = "without WORLD_SIZE, processes do not share their work"
            fix = "Start one torchrun a machine, or set WORLD_SIZE=1 for independent commands"
            raise PraError(f"{name}={os.environ[name]}: {problem}. {fix}", name=name)
    return variable("WORLD_SIZE", None if "RANK" in os.environ else "1", least=1)


def variable(name: str, default: str | None = None, least: int = 0, most: float = math.inf, fix: str = LAUNCH) -> int:
    """Return a whole number from the environment; refuse other text, and a number outside of ``[least, most]``."""
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal() or not least <= int(value) <= most:
        allowed = f"in [{least}, {most}]"
        raise PraError(f"{name}={value!r}: expected a whole number {allowed}. {fix}", name=name, value=value)
    return int(value)
