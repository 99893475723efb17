"""The peaks of a device: arithmetic by a large matrix product, memory by a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 10
"""Of each measurement, of which the fastest counts."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of matrix products, and bytes/s between memory and processor (read and written)."""

    flops: float
    bytes: float

    def floor(self, flops: float, traffic: float) -> float:
        """Return the least seconds: of the arithmetic or of the traffic, whichever takes longer."""
        return max(flops / self.flops, traffic / self.bytes)


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """Measure a device in a dtype, for a second or two; on a CPU with as many threads as torch has."""
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    with torch.inference_mode():
        a = torch.ones(side, side, device=device, dtype=dtype)
        product = torch.empty_like(a)
        source = torch.ones(length, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        multiply, copy = (
            min(timed(work, device) for _ in range(REPEATS + 1))
            for work in (lambda: torch.mm(a, a, out=product), lambda: target.copy_(source))
        )
    return Peak(2 * side**3 / multiply, 2 * length / copy)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a piece of work, the device's queue included."""
    _synchronise(device)
    begin = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - begin


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
