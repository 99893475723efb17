"""The exact rollout: training inputs that the model samples one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from pra import config
from pra.method import flow
from pra.method.rollout import SEQUENTIAL, perturbation
from pra.models import PRA
from pra.sampling import solvers
from pra.sampling.algorithm import Steps, generate


def exact_rollout(model: PRA, labels: Tensor, states: Tensor, how: config.Exact, key: Tensor) -> Tensor:
    """Let the model complete each state from ``t_i``, conditioned on what it wrote before; ``t_i = 0`` is sampling.

    PRA approximates this; it takes ``N`` times the depth.
    """
    z = states[:, :-1]
    t, eps = perturbation(z, how.t_min, how.t_max, key)
    start = flow.interpolate(eps, z, t)
    sampling = config.SamplingConfig(solver=config.Solver.MIDPOINT, steps=how.steps)
    steps, nothing = Steps(model, sampling, len(z)), z.new_empty(len(z), 0, model.config.patch_dim)
    times = solvers.uniform_grid(how.steps, t.squeeze(-1))
    return torch.cat([token.patch for token in generate(steps, labels, start, nothing, times=times)], dim=1)


SEQUENTIAL[config.Exact] = exact_rollout
