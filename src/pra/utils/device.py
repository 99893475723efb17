"""Where arithmetic runs and how precisely."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pra.config import Precision
from pra.errors import PraError


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is: CUDA, then Apple's MPS, then the CPU.

    A GPU named by its number becomes this thread's current one, for what of CUDA asks no tensor where it is.

    Raises:
        PraError: the name means nothing to torch, or that device is not there.
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
        raise PraError(f"device {name!r} cannot be used ({reason}); leave it out to take the best there is") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def cores() -> int:
    """CPU cores that this process may run on, at least 1: a job of a scheduler is often given some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of a training or sampling step; see :class:`pra.config.Precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(device, precision))


@contextmanager
def enough_memory(images: int, device: torch.device, way_out: str) -> Iterator[None]:
    """A block of work on so many images at a time, for which a device's memory may not do.

    Raises:
        PraError: it does not; ``way_out`` ends the message.
    """
    try:
        yield
    except RuntimeError as error:
        # For the CPU's allocator torch has no class of error.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise PraError(f"{images} images at a time are too many for the memory of {device}; {way_out}") from None


def in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether matrices are multiplied in bfloat16 there; of its own accord a GPU does that has it, from NVIDIA's
    Ampere on: older ones emulate it, slowly."""
    if precision is Precision.AUTO and device.type == "cuda":
        return _has_bfloat16(device)
    return precision is Precision.BFLOAT16


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    with torch.cuda.device(device):  # of the current one torch tells it
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
