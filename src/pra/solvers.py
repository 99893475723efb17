"""Integrators from noise (``t = 0``) to data (``t = 1``) over any velocity field. They know no model.

Each takes ``velocity(z, t)``, the start ``z``, and the grid of times ``t_0 < ... < t_K`` as a ``(K + 1, ...)``
tensor whose other sizes broadcast against the leading sizes of ``z`` (all but the last). The number of function
evaluations (NFE) per grid of ``K`` intervals: euler and euler_maruyama ``K``, midpoint and heun ``2 K``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pra import flow
from pra.config import Solver

Velocity = Callable[[Tensor, Tensor], Tensor]
NoiseSource = Callable[[int], Tensor]
"""Standard normal noise of the shape of ``z`` for interval ``k``; only Euler-Maruyama asks for it."""

Integrator = Callable[[Velocity, Tensor, Tensor, NoiseSource], Tensor]


def no_noise(interval: int) -> Tensor:
    """The noise source of a deterministic solver: never asked."""
    raise AssertionError("a deterministic solver asked for noise")


def uniform_grid(steps: int, start: Tensor) -> Tensor:
    """``steps`` equal intervals from ``start`` ``(...)`` to 1: ``(steps + 1, ...)``."""
    fractions = torch.linspace(0.0, 1.0, steps + 1, device=start.device)
    return start + (1 - start) * fractions.view(-1, *[1] * start.ndim)


def euler(velocity: Velocity, z: Tensor, times: Tensor, noise: NoiseSource) -> Tensor:
    """First order."""
    for t, t_next in pairwise(times):
        z = z + (t_next - t).unsqueeze(-1) * velocity(z, t)
    return z


def midpoint(velocity: Velocity, z: Tensor, times: Tensor, noise: NoiseSource) -> Tensor:
    """Second order; never evaluates at ``t = 1``, where the flow is stiffest."""
    for t, t_next in pairwise(times):
        dt = (t_next - t).unsqueeze(-1)
        half = z + 0.5 * dt * velocity(z, t)
        z = z + dt * velocity(half, 0.5 * (t + t_next))
    return z


def heun(velocity: Velocity, z: Tensor, times: Tensor, noise: NoiseSource) -> Tensor:
    """Second order, the trapezoidal rule."""
    for t, t_next in pairwise(times):
        dt = (t_next - t).unsqueeze(-1)
        v = velocity(z, t)
        z = z + 0.5 * dt * (v + velocity(z + dt * v, t_next))
    return z


def euler_maruyama(velocity: Velocity, z: Tensor, times: Tensor, noise: NoiseSource) -> Tensor:
    """The reverse SDE of SiT (arXiv 2401.08740, eq. 5) with diffusion ``w_t = 2 (1 - t)``; last interval plain Euler.

    ``dz = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW`` has the same marginals as the ODE.
    """
    last = len(times) - 2
    for k, (t, t_next) in enumerate(pairwise(times)):
        t, dt = t.unsqueeze(-1), (t_next - t).unsqueeze(-1)
        v = velocity(z, t.squeeze(-1))
        if k < last:
            v = v + (1 - t) * flow.score(v, z, t)
            z = z + (2 * (1 - t) * dt).sqrt() * noise(k)
        z = z + dt * v
    return z


INTEGRATORS: dict[Solver, Integrator] = {
    Solver.EULER: euler,
    Solver.MIDPOINT: midpoint,
    Solver.HEUN: heun,
    Solver.EULER_MARUYAMA: euler_maruyama,
}

EVALUATIONS: dict[Solver, int] = {
    Solver.EULER: 1,
    Solver.MIDPOINT: 2,
    Solver.HEUN: 2,
    Solver.EULER_MARUYAMA: 1,
}
"""Function evaluations per interval."""
