"""The sampler with caches, but with the model's own modules, one operation after another: what the engine replaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pra import noise, solvers
from pra.config import SamplingConfig, Solver
from pra.generate import Decoding
from pra.generate.decoding import chosen_head
from pra.generate.guidance import scale_at
from pra.models import PRA
from pra.noise import Purpose


@torch.no_grad()
def sample_plainly(model: PRA, config: SamplingConfig, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """The same images as ``Sampler(model, config).sample(labels, seeds)``."""
    size, device = model.config, model.device
    key = noise.keys(0, torch.tensor(seeds, device=device))
    starts = config.temperature * noise.normal(noise.fold(key, Purpose.SAMPLE_START), size.num_patches, size.state_dim)
    diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)
    grid = solvers.grid_of(config).view(-1, 1, 1).to(device)
    low, high = config.guidance_interval
    head = chosen_head(model, config)
    decoding = Decoding(model, torch.tensor(labels, device=device), config.guidance != 1.0, head=head)
    span = torch.full((1, 1), 1 / config.steps, device=device) if config.solver is Solver.SHORTCUT else None
    patches = []
    for i in range(size.num_patches):
        scale = scale_at(config, i, size.num_patches)
        guided, alone = decoding.velocity(scale, span), decoding.velocity(1.0, span)

        def velocity(z: Tensor, t: Tensor, guided: solvers.Velocity = guided, alone: solvers.Velocity = alone):
            return guided(z, t) if low <= t <= high else alone(z, t)

        def fresh(k: int, position: int = i) -> Tensor:
            return config.temperature * noise.normal(noise.fold(noise.fold(diffusion, position), k), 1, size.state_dim)

        z = solvers.INTEGRATORS[config.solver](velocity, starts[:, i : i + 1], grid, fresh)
        patches.append(decoding.append(model.codec.normalise(z) if config.renormalise else z))
    return model.unpatchify(torch.cat(patches, dim=1))
