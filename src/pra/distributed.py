"""Processes that share one command's work, as ``torchrun`` starts them; a single process is a world of one.

What passes between them are results, as Python objects over gloo; tensors stay on the devices.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from pra.device import pick_device
from pra.errors import PraError

T = TypeVar("T")
R = TypeVar("R")

MEETING = timedelta(minutes=5)
"""How long the processes wait for each other at the start."""

PATIENCE = timedelta(days=1)
"""How long they wait for the slowest one's results."""


@dataclass(frozen=True)
class World:
    """This process, number ``rank`` of ``size`` and number ``local_rank`` on its machine.

    Every process must come by the same calls of :meth:`combine` and :meth:`first_alone` in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """As :func:`pra.device.pick_device`; of several GPUs this process's own where the name does not say which.

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
        """``how(values)`` of every process's value, by rank: computed in the first process, given to all.

        Raises:
            PraError: another process has ended.
        """
        if self.size == 1:
            return how([value])
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.leads else None
        with _others_there():
            dist.gather_object(value, values)
        result: list[Any] = [None]
        if values is not None:
            values[0] = value  # itself, and not a copy that lacks what does not travel
            result = [how(values)]
        with _others_there():
            dist.broadcast_object_list(result)
        return result[0]  # type: ignore[no-any-return]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that one process of each machine passes before the others: it fills the caches that they read."""
        if self.local_rank > 0:
            self._meet()
        yield
        if self.local_rank == 0:
            self._meet()

    def _meet(self) -> None:
        self.combine(None, lambda _: None)


ALONE = World()


@contextmanager
def join() -> Iterator[World]:
    """The world that the environment describes: ``torchrun``'s variables, or this process alone.

    Only the first process warns. Where one fails on a :class:`PraError` or an ``OSError``, that is raised; in all the
    others, also where they fail on the same, ``SystemExit(2)``: so one line is printed.

    Raises:
        PraError: variables that are wrong, or processes that do not find each other.
    """
    size = _variable("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    world = World(_variable("RANK"), size, _variable("LOCAL_RANK"))
    try:
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=size, timeout=PATIENCE)
        dist.barrier()  # so that none can end while another still looks for it
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PraError(
            f"process {world.rank} of {size} does not find the others ({reason}); start them with torchrun"
        ) from None
    # When one has failed, torchrun ends the others so: they are to clean up, silently.
    previous = signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    try:
        with warnings.catch_warnings():
            if not world.leads:
                warnings.simplefilter("ignore")
            yield world
    except (PraError, OSError):
        # The first to fail speaks at once: the others may be at work for hours before they hear of it.
        if not _is_first(store):
            raise SystemExit(2) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    dist.destroy_process_group()


def _is_first(store: Any) -> bool:
    try:
        return bool(store.add("pra/failed", 1) == 1)
    except RuntimeError:  # the store went with the process that kept it, which has said why
        return False


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise PraError("another process of this command has ended early; see what it says") from None


def _variable(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        number = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = -1
    if number < (name == "WORLD_SIZE"):
        raise PraError(f"the environment's {name} is {value!r}, not a number of processes; start them with torchrun")
    return number
