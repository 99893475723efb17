"""Rollouts: the inputs of the AR pass (paper; docs/method.md). The heart of the method.

Every rollout returns the inputs ``x~_1 .. x~_{N-1}``, ``(B, N - 1, P)``: the last patch is never an input. States are
``(B, N, d)``; randomness comes from one key per sample. The caller stops the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pra import config
from pra.method import flow, noise
from pra.method.noise import Purpose
from pra.models.pra import PRA

SEQUENTIAL: dict[type[config.Rollout], Callable[[PRA, Tensor, Tensor, Any, Tensor], Tensor]] = {}
"""Rollouts that run the sampler. :func:`pra.sampling.exact_rollout` registers itself, as imports go downwards."""


def ar_inputs(how: config.Rollout, model: PRA, labels: Tensor, patches: Tensor, states: Tensor, key: Tensor) -> Tensor:
    """Return the inputs of the rollout ``how``."""
    match how:
        case config.Clean():
            return clean(patches)
        case config.Noised(sigma=sigma):
            return noised(patches, sigma, key)
        case config.Reconstructed():
            return reconstructed(model, states)
        case config.Parallel(t_min=t_min):
            return parallel(model, states, t_min, key)
        case _:
            return SEQUENTIAL[type(how)](model, labels, states, how, key)


def clean(patches: Tensor) -> Tensor:
    """Return the true patches (teacher forcing): training never shows the model a sampled patch."""
    return patches[:, :-1]


def noised(patches: Tensor, sigma: float, key: Tensor) -> Tensor:
    """Return the true patches plus white noise of standard deviation ``sigma``: sampled patches err in other ways."""
    x = patches[:, :-1]
    return x + sigma * noise.normal(noise.fold(key, Purpose.INPUT_NOISE), *x.shape[1:])


def reconstructed(model: PRA, states: Tensor) -> Tensor:
    """Return ``D(z)``: patches with the codec's errors, without those of sampling."""
    return model.write(states[:, :-1])


def parallel(model: PRA, states: Tensor, t_min: float, key: Tensor) -> Tensor:
    """Return ``D(z~)`` of :func:`perturbed` states: the parallel rollout approximation.

    As in sampling, the decoder writes pixels from imperfect states. Unlike in sampling, all positions run in parallel.
    """
    return model.write(perturbed(states[:, :-1], t_min, key))


def perturbed(states: Tensor, t_min: float, key: Tensor) -> Tensor:
    """Return ``z~_i = t_i z_i + (1 - t_i) eps_i`` with ``t_i ~ U(t_min, 1)``: ``(B, n, d)``."""
    t, eps = perturbation(states, t_min, 1.0, key)
    return flow.interpolate(eps, states, t)


def perturbation(z: Tensor, low: float, high: float, key: Tensor) -> tuple[Tensor, Tensor]:
    """Draw times in ``[low, high)``, ``(B, n, 1)``, and noise ``(B, n, d)``, independent at every position."""
    t = flow.uniform_times(noise.fold(key, Purpose.ROLLOUT_TIME), z.shape[1], 1, low=low, high=high)
    return t, noise.normal(noise.fold(key, Purpose.ROLLOUT_NOISE), *z.shape[1:])
