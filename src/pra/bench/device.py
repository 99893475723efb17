"""The peak rates of a device, and the time of a piece of work on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

REPEATS = 11
"""Repetitions of each measurement; the fastest counts."""


class Peak(NamedTuple):
    """FLOP/s of matrix products, and bytes/s between memory and processor (read and written)."""

    flops: float
    bytes: float


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """Measure a device in a dtype by a large matrix product and a large copy, for a second or two.

    A CPU is measured with torch's number of threads.
    """
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    with torch.inference_mode():
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        source = torch.ones(length, device=device, dtype=torch.uint8)
        product, target = torch.empty_like(matrix), torch.empty_like(source)
        works = lambda: torch.mm(matrix, matrix, out=product), lambda: target.copy_(source)
        multiply, copy = (min(timed(work, device) for _ in range(REPEATS)) for work in works)
    return Peak(2 * side**3 / multiply, 2 * length / copy)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a piece of work, the device's queue included."""

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    begin = now()
    work()
    return now() - begin
