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
from pra.models import PRA
from pra.models.cache import StaticCache
from pra.sampling import Steps

CACHE = ("keys", "values", "position", "mask")
STATE = {"read": CACHE, "write": CACHE, "integrate": ("embedded",)}
"""The tensors that each method reads and writes besides its inputs."""


def sampler_ahead_of_time(model: PRA, config: SamplingConfig, batch: int) -> Sampler:
    """A sampler whose steps are exported and compiled; its first batch exports them."""
    sampler = Sampler(model, config)
    with torch.inference_mode(False), torch.no_grad():
        steps = Steps(model, config, batch, StaticCache)
    steps.run = Exported(steps)
    sampler._parts(batch)  # settled first: it drops idle engines
    engine = sampler._engine(model, batch)
    engine.steps = steps
    sampler.idle = {batch: engine}
    return sampler


class Exported:
    """Runs the steps' methods as compiled packages, in place of :func:`pra.sampling.algorithm.run_plainly`."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.packages: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
        """Run a method of the steps; the first time of each exports it."""
        name, held = work.__name__, self._held(work.__name__)
        state = [getattr(held, attribute) for attribute in STATE[name]]
        given = [*state, *(tensor for tensor in inputs if tensor is not None)]
        if name not in self.packages:
            self.packages[name] = self._export(name, [tensor.clone() for tensor in given])
        return self.packages[name](*given)

    def _held(self, name: str) -> Any:
        """Find the owner of the tensors of a method besides its inputs: a cache, or the steps themselves."""
        return {"read": self.steps.backbone_cache, "write": self.steps.decoder_cache}.get(name, self.steps)

    def _export(self, name: str, inputs: list[Tensor]) -> Callable[..., Tensor]:
        held = self._held(name)
        before = dict(vars(held))  # tracing leaves its own tensors there
        with torch.inference_mode(False), torch.no_grad():
            inputs = [tensor.clone() for tensor in inputs]
            program = torch.export.export(Work(self.steps, name, held), tuple(inputs), strict=False)
            path = Path(tempfile.mkdtemp()) / f"{name}.pt2"
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        vars(held).update(before)
        return torch._inductor.aoti_load_package(package)  # type: ignore[no-any-return]


class Work(nn.Module):
    """One method of the steps as a module: the weights are its state; its other tensors are its first inputs."""

    def __init__(self, steps: Steps, name: str, held: Any) -> None:
        super().__init__()
        self.model, self.steps, self.name, self.held = steps.model, steps, name, held

    def forward(self, *inputs: Tensor) -> Tensor:
        """The method's output."""
        states = STATE[self.name]
        for state, tensor in zip(states, inputs, strict=False):
            setattr(self.held, state, tensor)
        given: list[Tensor | None] = list(inputs[len(states) :])
        if self.name == "integrate" and len(given) == 2:
            given.append(None)  # nothing is guided
        return getattr(self.steps, self.name)(*given)  # type: ignore[no-any-return]
