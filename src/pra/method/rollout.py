"""How the inputs of the AR pass are made (paper; docs/method.md). The heart of the method.

Every function returns the inputs ``x~_1 .. x~_{N-1}``, ``(B, N - 1, P)``: the last patch is never an input. The
states come in as ``z`` ``(B, N, d)``, the randomness as one key per sample (:mod:`pra.method.noise`). Nothing here has
a gradient: the caller holds the stop-gradient (:mod:`pra.method.objectives`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pra import config
from pra.method import flow, noise
from pra.method.noise import Purpose
from pra.models.pra import PRA
from pra.sampling import solvers
from pra.sampling.algorithm import Steps, generate


def ar_inputs(how: config.Rollout, model: PRA, labels: Tensor, patches: Tensor, states: Tensor, key: Tensor) -> Tensor:
    """The inputs that a configuration asks for."""
    match how:
        case config.Clean():
            return clean(patches)
        case config.Noised(sigma=sigma):
            return noised(patches, sigma, key)
        case config.Reconstructed():
            return reconstructed(model, states)
        case config.Parallel(t_min=t_min):
            return parallel(model, states, t_min, key)
        case config.Exact():
            return exact(model, labels, states, how, key)


def clean(patches: Tensor) -> Tensor:
    """Teacher forcing: the true patches. What sampling feeds the model, training has never shown it."""
    return patches[:, :-1]


def noised(patches: Tensor, sigma: float, key: Tensor) -> Tensor:
    """The true patches plus white noise: imperfect, but not in the way that sampled patches are."""
    x = patches[:, :-1]
    return x + sigma * noise.normal(noise.fold(key, Purpose.INPUT_NOISE), *x.shape[1:])


def reconstructed(model: PRA, states: Tensor) -> Tensor:
    """``D(z)``: the codec's own errors, but none of sampling's."""
    return model.write(states[:, :-1])


def parallel(model: PRA, states: Tensor, t_min: float, key: Tensor) -> Tensor:
    """The parallel rollout approximation: ``D(z~)`` with ``z~_i = t_i z_i + (1 - t_i) eps_i``, ``t_i ~ U(t_min, 1)``.

    The same state-to-pixel path as in sampling, from imperfect states, yet no position waits for another.
    """
    z = states[:, :-1]
    t, eps = _perturbation(z, t_min, 1.0, key)
    return model.write(flow.interpolate(eps, z, t))


def exact(model: PRA, labels: Tensor, states: Tensor, how: config.Exact, key: Tensor) -> Tensor:
    """Sequential rollout: the model completes each state from ``t_i``, conditioned on what it wrote before.

    ``t_i = 0`` is sampling itself, without guidance. This is what PRA approximates, at ``N`` times the depth.
    """
    z = states[:, :-1]
    t, eps = _perturbation(z, how.t_min, how.t_max, key)
    start = flow.interpolate(eps, z, t)
    sampling = config.SamplingConfig(solver=config.Solver.MIDPOINT, steps=how.steps)
    steps, nothing = Steps(model, sampling, len(z)), z.new_empty(len(z), 0, model.config.patch_dim)
    times = solvers.uniform_grid(how.steps, t.squeeze(-1))
    return torch.cat([token.patch for token in generate(steps, labels, start, nothing, times=times)], dim=1)


def _perturbation(z: Tensor, low: float, high: float, key: Tensor) -> tuple[Tensor, Tensor]:
    """Times ``(B, n, 1)`` and noise ``(B, n, d)``, independent per position."""
    t = flow.uniform_times(noise.fold(key, Purpose.ROLLOUT_TIME), z.shape[1], 1, low=low, high=high)
    return t, noise.normal(noise.fold(key, Purpose.ROLLOUT_NOISE), *z.shape[1:])
