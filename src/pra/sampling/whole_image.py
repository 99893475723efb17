"""Sampling of models, such as JiT, that make all patches of an image at once."""

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
    """Sample whole images ``(B, C, H, W)`` of conditions ``(B, ...)`` and keys ``(B,)`` by the velocity ``forward``."""
    shape, temperature = (model.config.num_patches, model.config.patch_dim), config.temperature
    patches = temperature * noise.normal(noise.fold(key, Purpose.SAMPLE_START), *shape)
    diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)

    def fresh_noise(interval: int) -> Tensor:
        return temperature * noise.normal(noise.fold(diffusion, interval), *shape)

    labels = torch.cat([label, model.condition.null_like(label)])
    told = labels, model.condition(labels)  # once for all evaluations
    for solver, times in stages(config):
        velocity = _velocity(model, forward, config, told, solvers.evaluation_times(solver, times.tolist()))
        patches = solvers.INTEGRATORS[solver](velocity, patches, times.view(-1, 1, 1).to(label.device), fresh_noise)
    return model.unpatchify(patches.clamp(-1.0, 1.0))


def stages(config: SamplingConfig) -> list[tuple[Solver, Tensor]]:
    """Return the solvers in turn, each with its grid of times.

    The last interval is Euler's, as in JiT's own sampler (and in Euler-Maruyama). It ends at the predicted image, and
    does not need the velocity at ``t = 1``.
    """
    grid = solvers.grid_of(config)
    if config.solver is Solver.EULER_MARUYAMA:
        return [(config.solver, grid)]
    return [(config.solver, grid[:-1]), (Solver.EULER, grid[-2:])]


def _velocity(
    model: ImageModel,
    forward: Callable[..., Tensor],
    config: SamplingConfig,
    told: tuple[Tensor, Tensor],
    asked: list[float],
) -> solvers.Velocity:
    plan = Plan(config, model.config.num_patches, asked)
    streams = iter(plan.streams(plan.most == 2))
    conditional_only = [each.chunk(2)[0] for each in told]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if next(streams) == 1:
            return forward(x, t, *conditional_only)
        conditional, unconditional = forward(x.repeat(2, 1, 1), t, *told).chunk(2)
        return unconditional + config.guidance * (conditional - unconditional)

    return velocity
