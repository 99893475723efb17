"""How the work of one token is run on a device: as it stands, compiled, or as CUDA graphs; and in which precision.

All of these run :class:`pra.sampling.algorithm.Steps` and so the model's own modules. The arithmetic compiled for a
CPU, for models that it knows, is :mod:`pra.sampling.native`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from pra.config import Precision, SamplingConfig
from pra.models import PRA
from pra.models.cache import KVCache, NewCache, StaticCache
from pra.sampling.algorithm import Steps, run_plainly
from pra.sampling.guidance import Plan
from pra.sampling.native import NativeSteps, unsupported
from pra.utils.compiler import compiled
from pra.utils.device import in_bfloat16

Run = Callable[..., Tensor]
"""``run(method, key, *inputs)``: see :attr:`pra.sampling.algorithm.Steps.run`."""

BUCKET = 32
"""Tokens by which attention's view of a cache grows where each view is a graph of its own."""

WARM_UPS = 2
"""Runs before a capture: libraries make their workspaces at the first, and a compiler compiles."""

_CAPTURING = threading.Lock()
"""A process captures one graph at a time: beginning one waits for the device, which no capture under way survives."""


class Compiled:
    """Runs work through torch's compiler, which would compile every view of a growing cache anew."""

    def __init__(self) -> None:
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
        """Run the work, a bound method; the first time of each kind takes the compiler a minute."""
        # The function without its object: kept here, the object could not be freed before Python looks for cycles.
        assert isinstance(work, MethodType)
        name = work.__name__
        if name not in self._compiled:
            self._compiled[name] = compiled(work.__func__, "compiling the sampler", "sample without compile")
        return self._compiled[name](work.__self__, *inputs)


class CudaGraphs:
    """Captures each kind of work at its first time and replays it from then on: one launch instead of thousands.

    Inputs are copied into memory that stays; what a replay returns is overwritten by the next one of its kind. The
    graphs share their memory: they run one after the other.

    Args:
        inner: runs the work that is captured.
        device: where; it need not be the current one.
    """

    def __init__(self, inner: Run, device: torch.device) -> None:
        self._inner, self._device = inner, device
        # Graphs that share memory are captured on one stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[str, object], tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def __call__(self, work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
        """Run the work on the device's current stream."""
        kind = work.__name__, key
        with torch.cuda.device(self._device):
            if kind not in self._graphs:
                with _CAPTURING:
                    self._graphs[kind] = self._capture(work, key, inputs)
            graph, held, output = self._graphs[kind]
            for static, given in zip(held, inputs, strict=True):
                if static is not None:
                    assert given is not None
                    static.copy_(given)
            graph.replay()
        return output

    def _capture(
        self, work: Callable[..., Tensor], key: object, inputs: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]:
        held = [None if given is None else given.clone() for given in inputs]
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self._inner(work, key, *held)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads ask of CUDA, one that pins memory for instance, does not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = self._inner(work, key, *held)
        return graph, held, output


def runner(device: torch.device, compile: bool) -> Run:
    """What runs the work of one token on a device; see :attr:`pra.sampling.algorithm.Steps.run`."""
    run: Run = Compiled() if compile else run_plainly
    return CudaGraphs(run, device) if device.type == "cuda" else run


@dataclass(frozen=True)
class Way:
    """How a model's steps are run.

    Attributes:
        plain: why the model's own modules run them, not the CPU's compiled arithmetic; ``None`` where that does.
        low: whether torch computes in bfloat16. (The compiled arithmetic rounds for itself.)
        cache: the kind of cache.
    """

    plain: str | None
    low: bool
    cache: NewCache

    def __str__(self) -> str:
        """For a person."""
        if self.plain is None:
            return "arithmetic compiled for this processor"
        return f"the model's own modules ({self.plain})"

    def autocast(self, device: torch.device) -> torch.autocast:
        """The block in which torch computes in this precision, and makes caches of its numbers."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.low)


def way_for(model: PRA, precision: Precision, compile: bool) -> Way:
    """The fastest way to run a model's steps where it is."""
    plain = "torch's compiler was asked for" if compile else unsupported(model)
    low = plain is not None and in_bfloat16(model.device, precision)
    if model.device.type == "cuda":
        return Way(plain, low, partial(StaticCache, bucket=None if compile else BUCKET))
    return Way(plain, low, StaticCache if compile else KVCache)


def cache_bytes(model: PRA, config: SamplingConfig, precision: Precision, compile: bool) -> int:
    """Bytes of the caches of one image, in an :class:`Engine` of these arguments."""
    way = way_for(model, precision, compile)
    with torch.inference_mode(), way.autocast(model.device):
        streams = Plan.of_head(config, model.config.num_patches).most
        caches = model.backbone.new_cache(streams, way.cache), model.codec.new_cache(1, way.cache)
    return sum(cache.nbytes for cache in caches if cache is not None)


class Engine:
    """The steps of one batch size on a device, kept from batch to batch.

    Args:
        model: what is sampled.
        config: checked against the model (:func:`pra.config.check_sampling`).
        batch: ``B``, images side by side.
        precision: of the matrix products; see :class:`pra.sampling.Sampler`.
        compile: whether torch's compiler fuses the steps.

    Attributes:
        steps: for :func:`pra.sampling.algorithm.generate`, within :meth:`arithmetic`.
        way: how they are run.
    """

    steps: Steps

    def __init__(
        self, model: PRA, config: SamplingConfig, batch: int, precision: Precision, compile: bool = False
    ) -> None:
        self._model, self._device = model, model.device
        self._fingerprint = fingerprint(model)
        self._lowered: Lowered | None = None
        self.way = way_for(model, precision, compile)
        with self.arithmetic():
            if self.way.plain is None:
                self.steps = NativeSteps(model, config, batch, in_bfloat16(self._device, precision))
                return
            self._lowered = Lowered(model) if self.way.low else None
            self.steps = Steps(self._lowered.model if self._lowered else model, config, batch, self.way.cache)
            self.steps.run = runner(self._device, compile)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The block in which steps are taken."""
        with torch.inference_mode(), self.way.autocast(self._device):
            yield

    def renew(self) -> bool:
        """Take over weights that were changed in place; ``False`` where the model itself has changed, or where its
        weights lie: make another engine."""
        if fingerprint(self._model) != self._fingerprint:
            return False
        if self._lowered is not None:
            with torch.inference_mode():
                self._lowered.refresh()
        return True


def fingerprint(model: nn.Module) -> list[object]:
    """What changes when a module is replaced, hooked or patched, or a parameter lies elsewhere."""
    everywhere = nn.modules.module
    marks: list[object] = [*everywhere._global_forward_hooks, *everywhere._global_forward_pre_hooks]
    for module in model.modules():
        own = vars(module)
        # The module itself, not its number: a number may come back when a module is gone.
        marks += module, own.get("forward"), len(own), *module._forward_hooks, *module._forward_pre_hooks
        marks += [parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None]
    return marks


class Lowered:
    """A model whose linear layers hold bfloat16 copies of the weights, so that no step need cast them.

    It is a copy of the module tree, hooks and wrappers included, that shares every other tensor with the original.

    Args:
        model: the original.
    """

    def __init__(self, model: PRA) -> None:
        self._copies = {
            id(parameter): (nn.Parameter(parameter.detach().bfloat16(), requires_grad=False), parameter)
            for module in model.modules()
            if isinstance(module, nn.Linear)
            for parameter in module.parameters(recurse=False)
            if parameter.dtype is torch.float32
        }
        tensors = [*model.parameters(), *model.buffers()]
        shared = {id(tensor): self._copies.get(id(tensor), (tensor,))[0] for tensor in tensors}
        self.model: PRA = copy.deepcopy(model, shared)

    def refresh(self) -> None:
        """Take over the original's present weights."""
        for copied, original in self._copies.values():
            copied.copy_(original)
