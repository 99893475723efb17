"""The probability path between noise and data, its times and targets: pure functions.

Convention of the paper: ``z_t = (1 - t) eps + t z``, so that ``t = 0`` is noise and ``t = 1`` is data, with the
velocity ``dz_t/dt = z - eps`` (rectified flow, arXiv 2209.03003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pra.method import noise


def interpolate(eps: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``z_t = (1 - t) eps + t z``."""
    return (1 - t) * eps + t * z


def velocity(eps: Tensor, z: Tensor) -> Tensor:
    """The target ``z - eps`` of the head."""
    return z - eps


def score(v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """``grad log p_t(z_t) = -E[eps | z_t] / (1 - t)`` with ``E[eps | z_t] = z_t - t v`` (SiT, 2401.08740, eq. 9)."""
    return (t * v - z_t) / (1 - t)


def uniform_times(key: Tensor, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw times in ``[low, high)``, ``(*key.shape, *shape)``."""
    return low + (high - low) * noise.uniform(key, *shape)


def dyadic_steps(key: Tensor, counts: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Draw steps of the path cut into 1, 2, 4, ... equal parts (``counts`` powers of two): ``t`` and span,
    ``(*key.shape, *shape)`` each. The powers are equally likely, and so are the parts of each."""
    which, where = noise.uniform(noise.fold(key, 0), *shape), noise.uniform(noise.fold(key, 1), *shape)
    exponent = (which * counts).long().clamp(max=counts - 1)
    # A shift: a table would have to be sent to the device, and powers may be rounded.
    count = (torch.ones_like(exponent) << exponent).float()
    return torch.minimum((where * count).floor(), count - 1) / count, 1 / count


def logit_normal_times(key: Tensor, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw sigmoids of normals, in (0, 1), ``(*key.shape, *shape)``."""
    return (mean + std * noise.normal(key, *shape)).sigmoid()
