"""Runs of a token's work on a device: direct, compiled or as CUDA graphs, in float32 or bfloat16."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from pra.config import Precision, SamplingConfig
from pra.models import PRA
from pra.models.cache import KVCache, NewCache, StaticCache
from pra.sampling.algorithm import Steps, run_plainly
from pra.sampling.guidance import plans
from pra.sampling.native import NativeSteps, unsupported
from pra.utils.compiler import compiled
from pra.utils.device import in_bfloat16

Run = Callable[..., Tensor]
"""``run(method, key, *inputs)``: see :attr:`pra.sampling.algorithm.Steps.run`."""

BUCKET = 32
"""Tokens by which attention's view of a cache grows. Each view needs its own CUDA graph."""

WARM_UPS = 2
"""Runs before a capture: in the first run libraries allocate workspaces, and the compiler compiles."""

_CAPTURING = threading.Lock()
"""Lock of captures: a new capture waits for the device, which breaks a capture in another thread."""


class Compiled:
    """Runs work through torch's compiler. Use a static cache: each view of a growing cache would compile again."""

    def __init__(self) -> None:
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
        """Run the work, a bound method. The first run of each method takes the compiler a minute."""
        # Keep the function without its object: a reference cycle would delay freeing it.
        assert isinstance(work, MethodType)
        name = work.__name__
        if name not in self._compiled:
            self._compiled[name] = compiled(work.__func__, "compiling the sampler", "sample without compile")
        return self._compiled[name](work.__self__, *inputs)


class CudaGraphs:
    """Captures each kind of work when it first runs, by ``inner``, and replays it: one launch instead of thousands.

    The next replay of a kind overwrites the result of a replay. The graphs share memory, so they must run one after the
    other.
    """

    def __init__(self, inner: Run, device: torch.device) -> None:
        self.inner, self._device = inner, device
        # Graphs that share memory are captured on one stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[str, object], tuple[torch.cuda.CUDAGraph, list[Tensor | None], Tensor]] = {}

    def __call__(self, work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
        """Run the work on the device's current stream."""
        kind = work.__name__, key
        with torch.cuda.device(self._device):
            if kind not in self.graphs:
                with _CAPTURING:
                    self.graphs[kind] = self._capture(work, key, inputs)
            graph, held, output = self.graphs[kind]
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
                self.inner(work, key, *held)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads' CUDA calls, such as pinning memory, do not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = self.inner(work, key, *held)
        return graph, held, output


def runner(device: torch.device, compile: bool) -> Run:
    """Choose how to run the work of one token on a device (:attr:`pra.sampling.algorithm.Steps.run`)."""
    run: Run = Compiled() if compile else run_plainly
    return CudaGraphs(run, device) if device.type == "cuda" else run


@dataclass(frozen=True)
class Way:
    """A way to run a model's steps, and the kind of ``cache`` for it.

    ``plain`` is the reason why the model's own modules run, or ``None`` where the CPU's compiled arithmetic runs. With
    ``low`` torch computes in bfloat16.
    """

    plain: str | None
    low: bool
    cache: NewCache

    def __str__(self) -> str:
        return f"the model's own modules ({self.plain})" if self.plain else "arithmetic compiled for this processor"

    @contextmanager
    def arithmetic(self, device: torch.device) -> Iterator[None]:
        """Open a block in which torch computes and makes caches in this precision."""
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.low):
            yield


def way_for(model: PRA, precision: Precision, compile: bool) -> Way:
    """Return the fastest way to run a model's steps on its device."""
    plain = "torch's compiler was asked for" if compile else unsupported(model)
    low = plain is not None and in_bfloat16(model.device, precision)
    if model.device.type == "cuda":
        return Way(plain, low, partial(StaticCache, bucket=None if compile else BUCKET))
    return Way(plain, low, StaticCache if compile else KVCache)


def cache_bytes(model: PRA, config: SamplingConfig, precision: Precision, compile: bool) -> int:
    """Return the bytes of the caches of one image, in an :class:`Engine` of these arguments."""
    way = way_for(model, precision, compile)
    with way.arithmetic(model.device):
        streams = max(
            plan.most for plan in plans(config, model.config.num_groups, model.is_told(config.solver)).values()
        )
        caches = model.backbone.new_cache(streams, way.cache), model.codec.new_cache(1, way.cache)
    return sum(cache.nbytes for cache in caches if cache is not None)


class Engine:
    """The ``steps`` for one batch size on a device, kept between batches. Run them within :meth:`arithmetic`."""

    steps: Steps

    def __init__(
        self, model: PRA, config: SamplingConfig, batch: int, precision: Precision, compile: bool = False
    ) -> None:
        self._model, self._device = model, model.device
        self._fingerprint = fingerprint(model)
        self._lowered: list[tuple[Tensor, Tensor]] = []
        self.way = way_for(model, precision, compile)
        with self.arithmetic():
            if self.way.plain is None:
                self.steps = NativeSteps(model, config, batch, in_bfloat16(self._device, precision))
                return
            if self.way.low:
                model, self._lowered = lowered(model)
            self.steps = Steps(model, config, batch, self.way.cache)
            self.steps.run = runner(self._device, compile)

    def arithmetic(self) -> AbstractContextManager[None]:
        """Return the block in which steps are taken."""
        return self.way.arithmetic(self._device)

    def renew(self) -> bool:
        """Copy weights that were changed in place. Return ``False`` if the model was changed otherwise, or was moved.

        Then make another engine.
        """
        if fingerprint(self._model) != self._fingerprint:
            return False
        with torch.inference_mode():
            for copied, original in self._lowered:
                copied.copy_(original)
        return True


def fingerprint(model: nn.Module) -> list[object]:
    """Return marks that change when a module is replaced, hooked or patched, or a parameter moves."""
    everywhere = nn.modules.module
    marks: list[object] = [*everywhere._global_forward_hooks, *everywhere._global_forward_pre_hooks]
    for module in model.modules():
        own = vars(module)
        # Keep the module, not its id: the id of a deleted module may be used again.
        marks += module, own.get("forward"), len(own), *module._forward_hooks, *module._forward_pre_hooks
        marks += [parameter.data_ptr() for parameter in module._parameters.values() if parameter is not None]
    return marks


def lowered(model: PRA) -> tuple[PRA, list[tuple[Tensor, Tensor]]]:
    """Copy a model, hooks and wrappers included, with bfloat16 weights in its linear layers: steps do not cast them.

    Returns:
        The copy, and pairs of a bfloat16 weight and its original: copy the original again when it changes in place.
    """
    copies = {
        id(parameter): (nn.Parameter(parameter.detach().bfloat16(), requires_grad=False), parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
        if parameter.dtype is torch.float32
    }
    tensors = [*model.parameters(), *model.buffers()]
    shared = {id(tensor): copies.get(id(tensor), (tensor,))[0] for tensor in tensors}
    return copy.deepcopy(model, shared), [*copies.values()]
