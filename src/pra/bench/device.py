"""What a device can do at best: arithmetic by a large matrix product, memory by a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 10
"""Of each measurement, of which the fastest counts: a bound is what is seen at best."""


@dataclass(frozen=True)
class Peak:
    """FLOP/s of matrix products, and bytes/s between memory and processor (read and written)."""

    flops: float
    bytes: float

    def floor(self, flops: float, traffic: float) -> float:
        """Seconds that cannot be undercut: the arithmetic's or the traffic's, whichever takes longer."""
        return max(flops / self.flops, traffic / self.bytes)


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of a device in a dtype. A second or two; on a CPU by as many threads as torch has."""
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    with torch.inference_mode():
        a = torch.ones(side, side, device=device, dtype=dtype)
        product = torch.empty_like(a)
        source = torch.ones(length, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        multiply = fastest(lambda: torch.mm(a, a, out=product), device)
        copy = fastest(lambda: target.copy_(source), device)
    return Peak(2 * side**3 / multiply, 2 * length / copy)


def fastest(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The least of the seconds that a piece of work takes, after one run to warm up."""
    return min(timed(work, device) for _ in range(repeats + 1))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work, the device's queue included."""
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
