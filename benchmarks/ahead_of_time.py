"""A sampler's steps compiled ahead of time (AOTInductor): what torch can do for a CPU without Python in the step.

For measuring alone: exporting takes a minute for each batch size, and what is exported does not follow changed weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pra import Sampler
from pra.config import SamplingConfig
from pra.generate import Steps
from pra.models import PRA
from pra.nn.cache import StaticCache

OPTIONS = {"freezing": True, "max_autotune": False}


def sampler_ahead_of_time(model: PRA, config: SamplingConfig, batch: int) -> Sampler:
    """A sampler whose steps are exported and compiled; its first batch exports them."""
    sampler = Sampler(model, config)
    with torch.inference_mode(False), torch.no_grad():
        steps = Steps(model, config, batch, StaticCache)
    steps.run = Exported(steps)
    engine = sampler._engine(model, batch)
    engine.steps = steps
    sampler._idle = {batch: engine}
    return sampler


class Exported:
    """Runs the steps' methods as compiled packages, in place of :func:`pra.generate.algorithm.run_plainly`."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.packages: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
        """Run a method of the steps; the first time of each exports it."""
        given = [tensor.clone() for tensor in inputs if tensor is not None]
        name, cache = work.__name__, self._cache(work.__name__)
        state = [] if cache is None else [cache.position.clone(), cache.mask.clone()]
        if name == "integrate":
            assert self.steps.embedded is not None
            state = [self.steps.embedded.clone()]
        if name not in self.packages:
            self.packages[name] = self._export(name, [*state, *given])
        return self.packages[name](*state, *given)

    def _cache(self, name: str) -> Any:
        return {"read": self.steps.backbone_cache, "write": self.steps.decoder_cache}.get(name)

    def _export(self, name: str, inputs: list[Tensor]) -> Callable[..., Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            inputs = [tensor.clone() for tensor in inputs]
            program = torch.export.export(Work(self.steps, name, self._cache(name)), tuple(inputs), strict=False)
            path = Path(tempfile.mkdtemp()) / f"{name}.pt2"
            package = torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=OPTIONS
            )
        return torch._inductor.aoti_load_package(package)  # type: ignore[no-any-return]


class Work(nn.Module):
    """One method of the steps as a module: the weights and the cache are its state, where the cache points an input."""

    def __init__(self, steps: Steps, name: str, cache: StaticCache | None) -> None:
        super().__init__()
        self.model, self.steps, self.name, self.cache = steps.model, steps, name, cache
        if cache is not None:
            self.register_buffer("keys", torch.zeros_like(cache.keys))
            self.register_buffer("values", torch.zeros_like(cache.values))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The method's output."""
        if self.cache is not None:
            self.cache.keys, self.cache.values = self.keys, self.values
            self.cache.position, self.cache.mask, *given = inputs
        else:
            self.steps.embedded, *given = inputs
        if self.name == "integrate" and len(given) == 2:
            given.append(None)  # nothing is guided
        return getattr(self.steps, self.name)(*given)  # type: ignore[no-any-return]
