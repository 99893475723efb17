"""The device and the precision of arithmetic."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pra.config import Precision
from pra.errors import PraError


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or the best there is: CUDA, then Apple's MPS, then the CPU.

    A GPU named by its number becomes this thread's current one. Refuse a device that is not there.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # numbers come back: not so from "meta"
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        message = f"device {name!r} cannot be used ({reason}). Leave it out to take the best there is"
        raise PraError(message, code="unsupported", name=name) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def cores() -> int:
    """Return the number of CPU cores that this process may run on; a scheduler may give a job only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the autocast context of a training or sampling step; see :class:`pra.config.Precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(device, precision))


def row_by_row(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Return ``work(batch)``, on a CPU row by row on one thread.

    The last digit of torch's matrix products on a CPU may depend on the other rows and on the number of threads (an
    AMD EPYC shows it).
    """
    if batch.device.type != "cpu":
        return work(batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return torch.cat([work(row) for row in torch.split(batch, 1)])
    finally:
        torch.set_num_threads(threads)


@contextmanager
def enough_memory(images: int, device: torch.device, way_out: str) -> Iterator[None]:
    """Turn a lack of memory in the block, for ``images`` at a time, into a PraError with the fix ``way_out``."""
    try:
        yield
    except RuntimeError as error:
        # For the CPU's allocator torch has no class of error.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        message = f"{images} images at a time are too many for the memory of {device}; {way_out}"
        raise PraError(message, code="too-large", value=images) from None


def in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Return whether matrices are multiplied in bfloat16; ``AUTO`` means so on GPUs that do not emulate it."""
    if precision is Precision.AUTO and device.type == "cuda":
        return _has_bfloat16(device)
    return precision is Precision.BFLOAT16


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):  # torch answers for the current device
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
