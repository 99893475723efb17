"""How the pieces of a step are run: as they stand, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pra.compiler import compiled

Work = Callable[[int, bool], None]
"""A piece of work over static buffers, told only what changes its shape. To do it twice is to do it once."""

BUCKET = 32
"""Tokens by which attention's view of a cache grows where each view is a graph of its own."""

WARM_UPS = 2
"""Runs before a capture: libraries make their workspaces at the first, and a compiler compiles."""


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
        self._compiled: dict[str, Work] = {}

    def __call__(self, work: Work, bound: int, guided: bool) -> None:
        """Does the work; the first time of each kind takes the compiler a minute."""
        name = work.__name__
        if name not in self._compiled:
            self._compiled[name] = compiled(work, "compiling the sampler", "sample without compile")
        self._compiled[name](bound, guided)


class CudaGraphs(Runner):
    """Captures each kind of work at its first time and replays it from then on: one launch instead of thousands.

    The graphs share their memory: they run one after the other, and what they leave lies in the static buffers.

    Args:
        inner: runs the work that is captured.
    """

    def __init__(self, inner: Runner) -> None:
        self.bucket = BUCKET
        self._inner = inner
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[str, int, bool], torch.cuda.CUDAGraph] = {}

    def __call__(self, work: Work, bound: int, guided: bool) -> None:
        """Does the work on the current stream."""
        key = (work.__name__, bound, guided)
        if key not in self._graphs:
            self._graphs[key] = self._capture(work, bound, guided)
        self._graphs[key].replay()

    def _capture(self, work: Work, bound: int, guided: bool) -> torch.cuda.CUDAGraph:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._inner(work, bound, guided)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._inner(work, bound, guided)
        return graph


def runner(device: torch.device, compile: bool) -> Runner:
    """The runner for a device."""
    inner = Compiled() if compile else Runner()
    return CudaGraphs(inner) if device.type == "cuda" else inner
