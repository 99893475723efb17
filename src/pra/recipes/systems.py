"""The systems that the paper compares with, as changes to a PRA run: the same blocks, loop, sampler and size.

| system            | state     | AR inputs                           | predicts |
|-------------------|-----------|-------------------------------------|----------|
| teacher-forced    | the patch | clean                               | v        |
| x-prediction      | the patch | clean                               | x        |
| input-noise       | the patch | clean + Gaussian noise              | v        |
| input-noise-x     | the patch | clean + Gaussian noise              | x        |
| states            | learned   | clean                               | v        |
| reconstructed     | learned   | decoded from unperturbed states     | v        |
| exact             | learned   | sampled sequentially by the model   | v        |
| jit               | the patch | none: all patches at once           | x        |

Every system has as many parameters as the PRA run that it changes, within 3 % (:data:`TOLERANCE`). Size thus does not
explain a difference. The pixel systems spend the codec's parameters on more blocks of the backbone, and the rest on a
wider head. JiT has the width nearest to the backbone's at which some depth gives the same size.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from dataclasses import replace

from pra.config import (
    AnyModelConfig,
    Clean,
    Exact,
    GuidanceSchedule,
    JiTConfig,
    ModelConfig,
    Noised,
    Prediction,
    Reconstructed,
    Rollout,
    RunConfig,
    SamplingConfig,
    Solver,
    TransformerConfig,
)
from pra.errors import PraError
from pra.models import count_parameters

TOLERANCE = 0.03
"""Largest relative difference in parameters between a system and the PRA run."""

HEAD_STEPS = 16
"""Head widths are multiples of a sixteenth of the PRA run's: round numbers for a GPU's matrix products."""

INPUT_NOISE = 0.3
"""Standard deviation for pixels in [-1, 1], the best of a coarse search. Sweep it for a real comparison."""

JIT_TIME_MEAN, JIT_TIME_STD = -0.8, 0.8
"""Mean and standard deviation of JiT's logit-normal times (arXiv 2511.13720), which favour noise."""


@functools.cache
def parameters(model: AnyModelConfig) -> int:
    """Count the parameters of a model, with those that sampling does not need (auxiliary predictor, encoder)."""
    return sum(count_parameters(model).values())


def _changed(run: RunConfig, rollout: Rollout, pixel: Prediction | None = None) -> RunConfig:
    """Change the AR inputs. With ``pixel`` the patch is the state, and the head makes this kind of prediction."""
    assert run.model.autoregressive, "the systems are changes to a PRA run"
    model = run.model if pixel is None else _pixel(run.model, pixel)
    return replace(run, model=model, train=replace(run.train, rollout=rollout), targets=None)


def _pixel(base: ModelConfig, prediction: Prediction) -> ModelConfig:
    """Remove the codec, and spend its parameters on the depth of the backbone, then on the width of the head."""
    budget = parameters(base)
    pixel = replace(base, codec=None, head=replace(base.head, prediction=prediction))
    deeper = [replace(pixel, backbone=replace(base.backbone, depth=depth)) for depth in (1, 2)]
    depth = _depth(budget, *map(parameters, deeper))
    model = replace(pixel, backbone=replace(base.backbone, depth=max(1, int(depth))))
    step = max(1, base.head.width // HEAD_STEPS)
    found = _wider_head(model, step, budget)
    while parameters(found) < (1 - TOLERANCE) * budget and step > 2:  # a step is too coarse for a small model
        step //= 2
        found = _wider_head(model, step, budget)
    return found


def _depth(budget: int, one: int, two: int) -> float:
    """Return the depth, not rounded, that gives ``budget`` parameters, from the counts at depth one and two."""
    return 1 + (budget - one) / (two - one)


def _wider_head(model: ModelConfig, step: int, budget: int) -> ModelConfig:
    """Return the model with the widest head within ``budget`` parameters; the width is a multiple of ``step``."""

    def wider(count: int) -> ModelConfig:
        return replace(model, head=replace(model.head, width=count * step))

    counts = range(1, 4 * model.head.width // step + 1)
    return wider(max(1, bisect.bisect_right(counts, budget, key=lambda count: parameters(wider(count)))))


def _jit(run: RunConfig) -> RunConfig:
    """Return the run of the diffusion baseline. A guidance scale that rises along the raster becomes its mean."""
    assert run.model.autoregressive, "the systems are changes to a PRA run"
    guidance = run.sampling.guidance
    if run.sampling.schedule is GuidanceSchedule.LINEAR:
        guidance = (1.0 + guidance) / 2
    steps = 50 if run.model.num_patches >= 256 else 20  # 50 steps of Heun in the paper
    objective = replace(run.train.objective, time_mean=JIT_TIME_MEAN, time_std=JIT_TIME_STD)
    return replace(
        run,
        model=_jit_model(run.model),
        train=replace(run.train, rollout=Clean(), objective=objective),
        sampling=SamplingConfig(guidance=guidance, solver=Solver.HEUN, steps=steps),
        targets=None,
    )


def _jit_model(base: ModelConfig) -> JiTConfig:
    """Return a JiT with the parameters of ``base``, within :data:`TOLERANCE`."""
    budget, heads = parameters(base), base.backbone.heads
    shared = ("image_size", "channels", "patch_size", "num_classes", "class_tokens", "text")
    kept = {name: getattr(base, name) for name in shared}

    def of(depth: int, width: int) -> JiTConfig:
        return JiTConfig(**kept, transformer=TransformerConfig(depth=depth, width=width, heads=heads))

    widths = range(4 * heads, 4 * base.backbone.width, 4 * heads)
    for width in sorted(widths, key=lambda width: abs(width - base.backbone.width)):
        blocks = _depth(budget, parameters(of(1, width)), parameters(of(2, width)))
        model = of(max(1, round(blocks)), width)
        if abs(parameters(model) - budget) <= TOLERANCE * budget:
            return model
    problem = f"no JiT of {heads} heads has about the {budget} parameters of this recipe's model"
    raise PraError(f"{problem}. Use another number of heads", code="unsupported")


SYSTEMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "teacher-forced": lambda run: _changed(run, Clean(), Prediction.VELOCITY),
    "x-prediction": lambda run: _changed(run, Clean(), Prediction.DATA),
    "input-noise": lambda run: _changed(run, Noised(sigma=INPUT_NOISE), Prediction.VELOCITY),
    "input-noise-x": lambda run: _changed(run, Noised(sigma=INPUT_NOISE), Prediction.DATA),
    "states": lambda run: _changed(run, Clean()),
    "reconstructed": lambda run: _changed(run, Reconstructed()),
    "exact": lambda run: _changed(run, Exact()),
    "jit": _jit,
}
