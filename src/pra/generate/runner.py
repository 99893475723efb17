"""How the pieces of a step are run: as they stand, or as CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from pra.compiler import compiled

Work = Callable[[int, bool], None]
"""A piece of work over static buffers, told only what changes its shape. To do it twice is to do it once."""

BUCKET = 32
"""Tokens by which attention's view of a cache grows where each view is a graph of its own."""

ALIGNED = 8
"""Tokens of which the length of a mask is a multiple, or CUDA's attention copies the mask into one, in every layer."""

WARM_UPS = 2
"""Runs before a capture: libraries make their workspaces at the first, and a compiler compiles."""

_CAPTURING = threading.Lock()
"""A process captures one graph at a time: beginning one waits for the device, which no capture under way survives."""


class Runner:
    """Runs work as it stands, attention seeing exactly the tokens that are there."""

    bucket: int | None = 1
    """Tokens by which attention's view grows; None is the whole cache at once."""

    def __call__(self, work: Work, bound: int, guided: bool) -> None:
        """Does the work."""
        work(bound, guided)


class Compiled(Runner):
    """Runs work through torch's compiler, which would compile every view of a cache anew."""

    bucket = None

    def __init__(self) -> None:
        self._compiled: dict[str, Callable[[Any, int, bool], None]] = {}

    def __call__(self, work: Work, bound: int, guided: bool) -> None:
        """Does the work, a bound method; the first time of each kind takes the compiler a minute."""
        # The function without its object: kept here, the object could not be freed before Python looks for cycles.
        assert isinstance(work, MethodType)
        name = work.__name__
        if name not in self._compiled:
            self._compiled[name] = compiled(work.__func__, "compiling the sampler", "sample without compile")
        self._compiled[name](work.__self__, bound, guided)


class CudaGraphs(Runner):
    """Captures each kind of work at its first time and replays it from then on: one launch instead of thousands.

    The graphs share their memory: they run one after the other, and what they leave lies in the static buffers.

    Args:
        inner: runs the work that is captured.
        device: where; it need not be the current one.
    """

    def __init__(self, inner: Runner, device: torch.device) -> None:
        self.bucket = BUCKET if inner.bucket == 1 else inner.bucket
        self._inner, self._device = inner, device
        # Graphs that share memory are captured on one stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[str, int, bool], torch.cuda.CUDAGraph] = {}

    def __call__(self, work: Work, bound: int, guided: bool) -> None:
        """Does the work on the device's current stream."""
        key = (work.__name__, bound, guided)
        with torch.cuda.device(self._device):
            if key not in self._graphs:
                with _CAPTURING:
                    self._graphs[key] = self._capture(work, bound, guided)
            self._graphs[key].replay()

    def _capture(self, work: Work, bound: int, guided: bool) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self._inner(work, bound, guided)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads ask of CUDA, one that pins memory for instance, does not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._inner(work, bound, guided)
        return graph


def runner(device: torch.device, compile: bool) -> Runner:
    """The runner for a device."""
    inner = Compiled() if compile else Runner()
    return CudaGraphs(inner, device) if device.type == "cuda" else inner
