"""Integrators from noise (``t = 0``) to data (``t = 1``) over any velocity field, and their time grids.

Each takes ``velocity(z, t)``, the start ``z``, and the grid of times ``t_0 < ... < t_K``. The grid is ``K + 1`` numbers
for all of ``z``, or a tensor ``(K + 1, ...)`` whose other sizes broadcast against the sizes of ``z`` but the last. For
``K`` intervals midpoint and heun take ``2 K`` evaluations, all others ``K``. Shortcut is Euler's rule over mean
velocities, which come from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from pra.config import SamplingConfig, Solver, TimeGrid
from pra.method import flow

Velocity = Callable[[Tensor, Any], Tensor]
"""A function from ``z`` and a time to the velocity. The time is a tensor or a number, like the grid."""

Times = Tensor | Sequence[float]

NoiseSource = Callable[[int], Tensor]
"""Standard normal noise of the shape of ``z`` for interval ``k``; only Euler-Maruyama needs it."""

Integrator = Callable[[Velocity, Tensor, Times, NoiseSource], Tensor]


def no_noise(interval: int) -> Tensor:
    """Refuse: a deterministic solver does not add noise."""
    raise AssertionError("a deterministic solver asked for noise")


def uniform_grid(steps: int, start: Tensor) -> Tensor:
    """Return ``steps`` equal intervals from ``start`` ``(...)`` to 1: ``(steps + 1, ...)``."""
    fractions = torch.linspace(0.0, 1.0, steps + 1, device=start.device)
    return start + (1 - start) * fractions.view(-1, *[1] * start.ndim)


def time_grid(kind: TimeGrid, steps: int, shift: float = 1.0) -> Tensor:
    """Return ``steps`` intervals from 0 to 1: ``(steps + 1,)`` float32 on the CPU, rising.

    uniform: equal intervals. cosine: ``(1 - cos(pi u)) / 2`` of equal ``u``, short at both ends. logit-normal: the
    quantiles of a standard logit-normal, short in the middle. ``shift`` s then maps ``1 - t`` to
    ``s (1 - t) / (1 + (s - 1)(1 - t))`` (arXiv 2403.03206, eq. 23). A shift above 1 puts more intervals near noise,
    below 1 near data; 1 changes nothing.
    """
    times = uniform_grid(steps, torch.zeros((), device="cpu"))
    if kind is TimeGrid.COSINE:
        times = 0.5 - 0.5 * (torch.pi * times).cos()
    elif kind is TimeGrid.LOGIT_NORMAL:
        normal = [NormalDist().inv_cdf(k / steps) for k in range(1, steps)]
        times = torch.cat([times[:1], torch.tensor(normal, device="cpu").sigmoid(), times[-1:]])
    if shift != 1.0:
        remaining = 1 - times
        times = 1 - shift * remaining / (1 + (shift - 1) * remaining)
    return times


def grid_of(config: SamplingConfig) -> Tensor:
    """Return the grid of the settings: ``(steps + 1,)`` float32 on the CPU."""
    if config.times is not None:
        return torch.tensor(config.times, dtype=torch.float32, device="cpu")
    return time_grid(config.time_grid, config.steps, config.shift)


def euler(velocity: Velocity, z: Tensor, times: Times, noise: NoiseSource) -> Tensor:
    """Integrate by Euler's rule, of first order."""
    for t, t_next in pairwise(times):
        z = _moved(z, t_next - t, velocity(z, t))
    return z


def midpoint(velocity: Velocity, z: Tensor, times: Times, noise: NoiseSource) -> Tensor:
    """Integrate by the midpoint rule, of second order. Never evaluates at ``t = 1``, where the flow is stiffest."""
    for t, t_next in pairwise(times):
        half = _moved(z, 0.5 * (t_next - t), velocity(z, t))
        z = _moved(z, t_next - t, velocity(half, 0.5 * (t + t_next)))
    return z


def heun(velocity: Velocity, z: Tensor, times: Times, noise: NoiseSource) -> Tensor:
    """Integrate by Heun's method, the trapezoidal rule, of second order."""
    for t, t_next in pairwise(times):
        v = velocity(z, t)
        z = _moved(z, 0.5 * (t_next - t), v + velocity(_moved(z, t_next - t, v), t_next))
    return z


def adams_bashforth(velocity: Velocity, z: Tensor, times: Times, noise: NoiseSource) -> Tensor:
    """Integrate by a second-order Adams-Bashforth rule.

    It extrapolates the last two velocities over unequal intervals. The first interval is Euler's.
    """
    before: tuple[Any, Tensor] | None = None
    for t, t_next in pairwise(times):
        dt, v = t_next - t, velocity(z, t)
        slope = v if before is None else _moved(v, 0.5 * dt / before[0], v - before[1])
        z = _moved(z, dt, slope)
        before = dt, v
    return z


def dpm(velocity: Velocity, z: Tensor, times: Times, noise: NoiseSource) -> Tensor:
    """Integrate by DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), second order with one evaluation per interval.

    It extrapolates the predicted data ``z + (1 - t) v`` linearly in ``lambda = log(t / (1 - t))``, and solves the rest
    exactly. ``lambda`` is infinite at both ends, so a step that would use an end is of first order: Euler's rule.
    """
    before: tuple[Any, Tensor] | None = None
    last = len(times) - 2
    for k, (t, t_next) in enumerate(pairwise(times)):
        data = _moved(z, 1 - t, velocity(z, t))
        target = data
        if before is not None and 1 < k < last:
            ratio = _log_snr_step(t, t_next) / _log_snr_step(before[0], t)
            target = _moved(data, 0.5 * ratio, data - before[1])
        z = _moved(z, (t_next - t) / (1 - t), target - z)
        before = t, data
    return z


def euler_maruyama(velocity: Velocity, z: Tensor, times: Times, noise: NoiseSource) -> Tensor:
    """Integrate the reverse SDE of SiT (arXiv 2401.08740, eq. 5) with diffusion ``w_t = 2 (1 - t)``.

    ``dz = (v + (1 - t) score) dt + sqrt(2 (1 - t)) dW`` has the same marginals as the ODE. The last interval is plain
    Euler.
    """
    last = len(times) - 2
    for k, (t, t_next) in enumerate(pairwise(times)):
        v = velocity(z, t)
        t, dt = _wide(t), _wide(t_next - t)
        if k < last:
            v = v + (1 - t) * flow.score(v, z, t)
            z = z + (2 * (1 - t) * dt) ** 0.5 * noise(k)
        z = z + dt * v
    return z


def _wide(t: Any) -> Any:
    return t.unsqueeze(-1) if isinstance(t, Tensor) else t


def _moved(z: Tensor, dt: Any, v: Tensor) -> Tensor:
    return z + dt.unsqueeze(-1) * v if isinstance(dt, Tensor) else torch.add(z, v, alpha=dt)


def _log_snr_step(t: Any, t_next: Any) -> Any:
    quotient = t_next * (1 - t) / (t * (1 - t_next))
    return quotient.log() if isinstance(quotient, Tensor) else math.log(quotient)


INTEGRATORS: dict[Solver, Integrator] = {
    Solver.EULER: euler,
    Solver.MIDPOINT: midpoint,
    Solver.HEUN: heun,
    Solver.EULER_MARUYAMA: euler_maruyama,
    Solver.ADAMS_BASHFORTH: adams_bashforth,
    Solver.DPM: dpm,
    Solver.SHORTCUT: euler,
}


def evaluation_times(solver: Solver, times: Sequence[float]) -> list[float]:
    """Return the times at which a solver evaluates the velocity, in order."""
    asked: list[float] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        asked.append(t)
        return z

    nothing = torch.zeros(1)
    INTEGRATORS[solver](velocity, nothing, times, lambda interval: nothing)
    return asked


EVALUATIONS: dict[Solver, int] = {solver: len(evaluation_times(solver, (0.0, 1.0))) for solver in Solver}
"""Function evaluations per interval."""
