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

Every system has as many parameters as the PRA run it changes, within 3 % (:data:`TOLERANCE`), so that a difference
is the method's and not the size's. The pixel systems spend the codec's parameters on whole blocks of the backbone, and
the rest on the head's width. JiT is as wide as the backbone, or as near to it as some depth meets the number.
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
"""Largest relative difference between a system's number of parameters and the PRA run's."""

HEAD_STEPS = 16
"""Head widths are multiples of a sixteenth of the PRA run's: round numbers for a GPU's matrix products."""

INPUT_NOISE = 0.3
"""Of pixels in [-1, 1]: the best of a coarse search. Sweep it for a real comparison."""

JIT_TIME_MEAN, JIT_TIME_STD = -0.8, 0.8
"""JiT's own (arXiv 2511.13720): times lean towards the noise."""


@functools.cache
def parameters(model: AnyModelConfig) -> int:
    """Return the parameters of a model, with those of training alone (the auxiliary predictor, the encoder)."""
    return sum(count_parameters(model).values())


def _autoregressive(run: RunConfig) -> ModelConfig:
    if not run.model.autoregressive:
        raise PraError(
            f"the systems are changes to a PRA run, not to {run.recipe}", code="unsupported", name=run.recipe
        )
    return run.model


def _inputs(run: RunConfig, rollout: Rollout) -> RunConfig:
    return replace(run, train=replace(run.train, rollout=rollout), targets=None)


def _pixel(run: RunConfig, prediction: Prediction, rollout: Rollout) -> RunConfig:
    """The patch itself as the state; the codec's parameters go to the backbone's depth, the rest to the head."""
    base = _autoregressive(run)
    budget = parameters(base)
    pixel = replace(base, codec=None, head=replace(base.head, prediction=prediction))
    most = 3 * base.backbone.depth
    deep = _largest(lambda depth: replace(pixel, backbone=replace(pixel.backbone, depth=depth)), most, budget)
    step = max(1, base.head.width // HEAD_STEPS)
    model = _wider_head(deep, step, budget)
    while parameters(model) < (1 - TOLERANCE) * budget and step > 2:  # where a step is a large part of a small model
        step //= 2
        model = _wider_head(deep, step, budget)
    return _inputs(replace(run, model=model), rollout)


def _wider_head(model: ModelConfig, step: int, budget: int) -> ModelConfig:
    most = 4 * model.head.width // step
    return _largest(lambda count: replace(model, head=replace(model.head, width=count * step)), most, budget)


def _largest(configure: Callable[[int], ModelConfig], most: int, budget: int) -> ModelConfig:
    """``configure(n)`` of the largest ``n`` from 1 to ``most`` within ``budget`` parameters, which grow with ``n``."""
    sizes = range(1, most + 1)
    return configure(max(1, bisect.bisect_right(sizes, budget, key=lambda size: parameters(configure(size)))))


def _jit(run: RunConfig) -> RunConfig:
    """The diffusion baseline. Guided by the mean of the PRA run's scales, as it has no raster to raise them along."""
    base, sampling = _autoregressive(run), run.sampling
    guidance = sampling.guidance
    if sampling.schedule is GuidanceSchedule.LINEAR:
        guidance = (1.0 + guidance) / 2
    steps = 50 if base.num_patches >= 256 else 20  # Heun's 50 are the paper's
    objective = replace(run.train.objective, time_mean=JIT_TIME_MEAN, time_std=JIT_TIME_STD)
    return replace(
        run,
        model=_jit_model(base),
        train=replace(run.train, rollout=Clean(), objective=objective),
        sampling=SamplingConfig(guidance=guidance, solver=Solver.HEUN, steps=steps),
        targets=None,
    )


def _jit_model(base: ModelConfig) -> JiTConfig:
    budget, heads = parameters(base), base.backbone.heads
    widths = range(4 * heads, 4 * base.backbone.width, 4 * heads)
    for width in sorted(widths, key=lambda width: abs(width - base.backbone.width)):
        one, two = (parameters(_jit_of(base, depth, width)) for depth in (1, 2))
        depth = 1 + max(0, round((budget - one) / (two - one)))  # every block has as many
        if abs(one + (depth - 1) * (two - one) - budget) <= TOLERANCE * budget:
            return _jit_of(base, depth, width)
    raise PraError(
        f"no JiT of {heads} heads has about the {budget} parameters of this recipe's model", code="unsupported"
    )


def _jit_of(base: ModelConfig, depth: int, width: int) -> JiTConfig:
    return JiTConfig(
        image_size=base.image_size,
        channels=base.channels,
        patch_size=base.patch_size,
        num_classes=base.num_classes,
        class_tokens=base.class_tokens,
        transformer=TransformerConfig(depth=depth, width=width, heads=base.backbone.heads),
    )


SYSTEMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "teacher-forced": lambda run: _pixel(run, Prediction.VELOCITY, Clean()),
    "x-prediction": lambda run: _pixel(run, Prediction.DATA, Clean()),
    "input-noise": lambda run: _pixel(run, Prediction.VELOCITY, Noised(sigma=INPUT_NOISE)),
    "input-noise-x": lambda run: _pixel(run, Prediction.DATA, Noised(sigma=INPUT_NOISE)),
    "states": lambda run: _inputs(run, Clean()),
    "reconstructed": lambda run: _inputs(run, Reconstructed()),
    "exact": lambda run: _inputs(run, Exact()),
    "jit": _jit,
}
