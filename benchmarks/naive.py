"""The sampler without caches: every position runs the whole prefix again. The yardstick of speed and of parity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pra.config import SamplingConfig, Solver
from pra.method import noise
from pra.method.noise import Purpose
from pra.models import PRA
from pra.sampling import solvers
from pra.sampling.guidance import scale_at


@torch.inference_mode()
def sample_without_caches(model: PRA, config: SamplingConfig, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """The same images as ``Sampler(model, config).sample(labels, seeds)``, written as the formulas stand."""
    size, device = model.config, model.device
    label = torch.tensor(labels, device=device)
    key = noise.keys(0, torch.tensor(seeds, device=device))
    starts = noise.normal(noise.fold(key, Purpose.SAMPLE_START), size.num_groups, size.group_state_dim)
    diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)
    low, high = config.guidance_interval
    head = model.head_for(config.solver)
    patches = torch.empty(len(labels), 0, size.group_dim, device=device)
    states = torch.empty(len(labels), 0, size.group_state_dim, device=device)
    for i in range(size.num_groups):
        conditional = model.conditions(label, patches)[:, -1:]
        unconditional = model.conditions(model.condition.null_like(label), patches)[:, -1:]
        scale, steps = scale_at(config, i, size.num_groups), config.steps_at(i, size.num_groups)
        grid = solvers.grid_of(replace(config, steps=steps, raster_steps=None)).view(-1, 1, 1).to(device)
        span = torch.full((1, 1), 1 / steps, device=device) if config.solver is Solver.SHORTCUT else None

        def velocity(z: Tensor, t: Tensor, c=conditional, u=unconditional, s: float = scale, span=span):
            if head.scale_in is not None:
                return head(z, t, head.project(c), span, scale=torch.tensor([[s]], device=device))
            v_c, v_u = (head(z, t, head.project(h), span) for h in (c, u))
            return v_u + s * (v_c - v_u) if low <= t <= high else v_c

        def fresh(k: int, position: int = i) -> Tensor:
            keys = noise.fold(noise.fold(diffusion, position), k)
            return config.temperature * noise.normal(keys, 1, size.group_state_dim)

        z = solvers.INTEGRATORS[config.solver](velocity, config.temperature * starts[:, i : i + 1], grid, fresh)
        states = torch.cat([states, model.codec.normalise(z) if config.renormalise else z], dim=1)
        patches = torch.cat([patches, model.write(states)[:, -1:]], dim=1)
    return model.picture(patches).clamp(-1.0, 1.0)
