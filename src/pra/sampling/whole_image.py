"""Sampling of models that make all patches of an image at once, as JiT does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pra.config import SamplingConfig, Solver
from pra.method import noise
from pra.method.noise import Purpose
from pra.models.base import ImageModel
from pra.sampling import solvers
from pra.sampling.guidance import Plan


def sample_at_once(
    model: ImageModel, forward: Callable[..., Tensor], config: SamplingConfig, label: Tensor, key: Tensor
) -> Tensor:
    """Whole images ``(B, C, H, W)`` from noise.

    Args:
        model: whose images.
        forward: its velocity, perhaps compiled.
        config: how.
        label: ``(B,)``.
        key: ``(B,)``, of each image's randomness.
    """
    shape, temperature = (model.config.num_patches, model.config.patch_dim), config.temperature
    start = temperature * noise.normal(noise.fold(key, Purpose.SAMPLE_START), *shape)
    diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)

    def fresh_noise(interval: int) -> Tensor:
        return temperature * noise.normal(noise.fold(diffusion, interval), *shape)

    patches = start
    for solver, times in stages(config):
        velocity = _velocity(model, forward, config, label, solvers.evaluation_times(solver, times.tolist()))
        times = times.view(-1, 1, 1).to(label.device)
        patches = solvers.INTEGRATORS[solver](velocity, patches, times, fresh_noise)
    return model.unpatchify(patches.clamp(-1.0, 1.0))


def stages(config: SamplingConfig) -> list[tuple[Solver, Tensor]]:
    """The solvers one after the other, with the times between which each steps.

    The last interval is Euler's, as in JiT's own sampler (Euler-Maruyama's is so anyway): from there the predicted
    image is the end, and no velocity at ``t = 1`` is asked for.
    """
    grid = solvers.grid_of(config)
    if config.solver is Solver.EULER_MARUYAMA:
        return [(config.solver, grid)]
    return [(config.solver, grid[:-1]), (Solver.EULER, grid[-2:])]


def _velocity(
    model: ImageModel, forward: Callable[..., Tensor], config: SamplingConfig, label: Tensor, asked: list[float]
) -> solvers.Velocity:
    """The field of whole images under guidance, for evaluations at the times asked."""
    plan = Plan(config, model.config.num_patches, asked)
    streams = iter(plan.streams(plan.most == 2))
    labels = torch.cat([label, model.condition.null_like(label)])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if next(streams) == 1:
            return forward(x, t, label)
        conditional, unconditional = forward(x.repeat(2, 1, 1), t, labels).chunk(2)
        return unconditional + config.guidance * (conditional - unconditional)

    return velocity
