"""The probability path between noise and data, its times and targets: pure functions.

Convention of the paper: ``z_t = (1 - t) eps + t z``, so ``t = 0`` is noise and ``t = 1`` is data. The velocity is
``dz_t/dt = z - eps`` (rectified flow, arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pra.method import noise


def interpolate(eps: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Return ``z_t = (1 - t) eps + t z``."""
    return (1 - t) * eps + t * z


def velocity(eps: Tensor, z: Tensor) -> Tensor:
    """Return the head's target ``z - eps``."""
    return z - eps


def score(v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """Return the score of a velocity, ``grad log p_t(z_t) = (t v - z_t) / (1 - t)`` (SiT, arXiv 2401.08740, eq. 9)."""
    return (t * v - z_t) / (1 - t)


def uniform_times(key: Tensor, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw times in ``[low, high)``, ``(*key.shape, *shape)``."""
    return low + (high - low) * noise.uniform(key, *shape)


def dyadic_steps(key: Tensor, counts: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Draw steps of a path that is cut into ``2^k`` equal parts.

    ``k`` is uniform in ``0 .. counts - 1``, and the part is uniform among the ``2^k``.

    Returns:
        The time ``t`` at which the step begins, and its span ``2^-k``: ``(*key.shape, *shape)`` each.
    """
    exponent = (noise.uniform(noise.fold(key, 0), *shape) * counts).long().clamp(max=counts - 1)
    # Shift instead of a table (a copy to the device) or a power (which may be rounded).
    parts = (torch.ones_like(exponent) << exponent).float()
    part = torch.minimum((noise.uniform(noise.fold(key, 1), *shape) * parts).floor(), parts - 1)
    return part / parts, 1 / parts


def logit_normal_times(key: Tensor, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw times as sigmoids of normal numbers, in (0, 1): ``(*key.shape, *shape)``."""
    return (mean + std * noise.normal(key, *shape)).sigmoid()
