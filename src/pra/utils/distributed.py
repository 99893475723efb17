"""Processes that share one command's work, as ``torchrun`` starts them; a single process is a world of one.

Results pass between them as Python objects, and numbers as tensors: over gloo from CPUs, over nccl from GPUs. Who runs
``pra`` by another launcher than ``torchrun`` sets its variables: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``,
``MASTER_ADDR`` and ``MASTER_PORT``; ``PRA_RENDEZVOUS_TIMEOUT`` is how many seconds the processes wait for each other.
"""

from __future__ import annotations

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
from torch import Tensor

from pra.errors import PraError, reason_of
from pra.utils.device import pick_device
from pra.utils.signals import ended_by_sigterm

T = TypeVar("T")
R = TypeVar("R")

MEETING = timedelta(minutes=5)
"""How long the processes wait for each other at the start, where ``PRA_RENDEZVOUS_TIMEOUT`` does not say."""

LOST = "another process of this command has ended early; see what it says"

STEP = timedelta(minutes=30)
"""How long they wait for each other within a training step: a machine that is gone without a word ends the others."""

PATIENCE = timedelta(days=1)
"""How long they wait for the slowest one's results, and for what one does for all."""


@dataclass(frozen=True)
class World:
    """This process, number ``rank`` of ``size`` and number ``local_rank`` on its machine.

    Every process must come by the same calls of its methods, but for :meth:`device` and :meth:`share`, in the same
    order. They raise a PraError where another process has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patient: Any = field(default=None, repr=False, compare=False)
    """torch's group of all processes whose calls may take :data:`PATIENCE`; those of its default one, :data:`STEP`."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """Return the device of :func:`pick_device`; with several GPUs, this process's own unless the name says which.

        Raises:
            PraError: as there, or the machine has fewer GPUs than processes.
        """
        if self.size == 1 or name not in (None, "cuda") or not torch.cuda.is_available():
            return pick_device(name)
        if self.local_rank >= torch.cuda.device_count():
            raise PraError(
                f"process {self.local_rank} of this machine has no GPU of its own, there are "
                f"{torch.cuda.device_count()}; start as many processes, or say which with --device"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def share(self, count: int) -> range:
        """This process's part of ``count`` items: consecutive, and disjoint from the others'."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def combine(self, value: T, how: Callable[[list[T]], R]) -> R:
        """``how(values)`` of every process's value, by rank: computed in the first process, given to all. Patient.

        Raises:
            PraError: another process has ended.
        """
        if self.size == 1:
            return how([value])
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.is_first else None
        with _others_there():
            dist.gather_object(value, values, group=self.patient)
        result: list[Any] = [None]
        if values is not None:
            values[0] = value  # itself, and not a copy that lacks what does not travel
            result = [how(values)]
        with _others_there():
            dist.broadcast_object_list(result, group=self.patient)
        return result[0]  # type: ignore[no-any-return]

    def run_on_first(self, do: Callable[[], R]) -> R:
        """Run a function on rank 0 alone and return its result on every rank. Patient."""
        return self.combine(None, lambda _: do())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of a float tensor, on its device."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        with _others_there():
            total = values.clone()
            dist.all_reduce(total)
        return total / self.size

    def highest(self, value: int, patient: bool = False) -> int:
        """The largest of the processes' values. Over gloo: no GPU is waited for."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        found = torch.tensor(value)
        with _others_there():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.patient if patient else None)
        return int(found)

    def barrier(self, patient: bool = False) -> None:
        """Waits for all processes: what failed in one of them before, it has told, and ends the others here.

        Args:
            patient: one may have work of any length to do before; without, about as long as the others.
        """
        self.highest(0, patient)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of torch's own collectives; other errors than the loss of a process pass."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_lost_connection(error):
                raise
            raise PraError(LOST) from None

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that one process of each machine passes before the others: it fills the caches that they read."""
        if self.local_rank > 0:
            self.barrier(patient=True)
        yield
        if self.local_rank == 0:
            self.barrier(patient=True)


ALONE = World()


@contextmanager
def join() -> Iterator[World]:
    """The world that the environment describes: ``torchrun``'s variables, or this process alone.

    Only the first process warns. Where one fails on a :class:`PraError` or an ``OSError``, that is raised; in all the
    others, also where they fail on the same, ``SystemExit(2)``: so one line is printed.

    Raises:
        PraError: variables that are wrong, or processes that do not find each other.
    """
    size = _size()
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    world, store = _met(_rank(size), size, _variable("LOCAL_RANK"))
    with ended_by_sigterm():  # when one has failed, torchrun ends the others so: they are to clean up, silently
        try:
            with warnings.catch_warnings():
                if not world.is_first:
                    warnings.simplefilter("ignore")
                yield world
        except (PraError, OSError):
            # The first to fail speaks at once: the others may be at work for hours before they hear of it.
            if not _is_first(store):
                raise SystemExit(2) from None
            raise
    dist.destroy_process_group()


def _met(rank: int, size: int, local_rank: int) -> tuple[World, Any]:
    """The world when all processes are there, and the store that they share."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    patience = _meeting()
    try:
        with _hushed():
            store, _, _ = next(rendezvous("env://", timeout=patience))
            store = _own_part(store, rank, size, patience)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.all_reduce(torch.zeros(()), group=patient)  # so that none can end while another still looks for it
        return World(rank, size, local_rank, patient), store
    except (RuntimeError, ValueError, OSError) as error:
        raise PraError(
            f"process {rank} of {size} does not find the others at {_address()} ({reason_of(error)}); start all with "
            "torchrun, at an address that every machine reaches (PRA_RENDEZVOUS_TIMEOUT says how many seconds to wait)"
        ) from None


def _own_part(store: Any, rank: int, size: int, patience: timedelta) -> Any:
    """The part of the store that belongs to these processes, when all of them are there.

    torchrun's store outlives a restart, with all that the processes before have written; and each machine counts its
    restarts for itself. So a process makes itself known under a name that it has drawn, and the first answers it.

    Raises:
        RuntimeError: after ``patience``, where torch itself would wait as long as for results.
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
            elif store.check([f"pra/name-{other}"]):  # perhaps of one that has ended: asked again until it comes
                store.set(f"pra/answer-{store.get(f'pra/name-{other}').decode()}", name)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"of the others {len(missing)} have not come, number {min(missing)} among them")
        time.sleep(0.02)
    part.set("here-0", "")
    return part


def _is_first(store: Any) -> bool:
    try:
        with _hushed():
            return bool(store.add("pra/failed", 1) == 1)
    except RuntimeError:  # the store went with the process that kept it, which has said why
        return False


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what C++ has to say on the standard error, pages of it: what fails is raised as well."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        for descriptor in (kept, nowhere):
            os.close(descriptor)


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise PraError(LOST) from None


def _is_lost_connection(error: RuntimeError) -> bool:
    """torch has no class of its own for what gloo says; nccl's is a ``DistError``."""
    return "gloo" in str(error) or isinstance(error, torch.distributed.DistError)


def _address() -> str:
    return ":".join(os.environ.get(name, f"(no {name})") for name in ("MASTER_ADDR", "MASTER_PORT"))


def _meeting() -> timedelta:
    value = os.environ.get("PRA_RENDEZVOUS_TIMEOUT", str(int(MEETING.total_seconds())))
    if not value.isdecimal() or not int(value):
        raise PraError(f"the environment's PRA_RENDEZVOUS_TIMEOUT is {value!r}, not a number of seconds; set 300, say")
    return timedelta(seconds=int(value))


def _size() -> int:
    """How many processes there are."""
    if "WORLD_SIZE" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
            if os.environ.get(name, "1") != "1":
                raise PraError(
                    f"{os.environ[name]} processes were started ({name}) that know nothing of each other: start one "
                    "torchrun a machine, which starts them, or set WORLD_SIZE=1 for commands that share no work"
                )
    return _variable("WORLD_SIZE", None if "RANK" in os.environ else 1)


def _rank(size: int) -> int:
    rank = _variable("RANK")
    if rank >= size:
        raise PraError(
            f"the environment's RANK is {rank}, but WORLD_SIZE {size} has the ranks 0 to {size - 1}; start the "
            "processes with torchrun"
        )
    return rank


def _variable(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        number = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1
    if number < (name == "WORLD_SIZE"):
        raise PraError(f"the environment's {name} is {value!r}, not a number of processes; start them with torchrun")
    return number
