"""Random numbers as pure functions of a key: the same for every batch, order, device and number of processes.

A key is one 64-bit integer per sample. :func:`fold` derives the key of a sub-stream (a step, a position, a purpose).
Number ``j`` of a key is SplitMix64 at counter ``j`` (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014). It is computed in float64 and rounded, which hides the differences between math libraries.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


class Purpose(enum.IntEnum):
    """Independent streams of one key. Never renumber: a seed would give other random numbers."""

    AUGMENT = 1
    CLASS_DROPOUT = 2
    INPUT_NOISE = 3
    ROLLOUT_TIME = 4
    ROLLOUT_NOISE = 5
    FLOW_TIME = 6
    FLOW_NOISE = 7
    SAMPLE_START = 8
    SAMPLE_DIFFUSION = 9
    SHUFFLE = 10
    LABEL = 11
    SHORTCUT_TIME = 12
    SHORTCUT_NOISE = 13
    HELD_OUT = 14
    ENCODER_MASK = 15
    CAPTION = 16
    SHORTCUT_GUIDANCE = 17


def keys(seed: int, indices: Tensor) -> Tensor:
    """Return one key per sample from a seed and the samples' indices: int64, shaped as ``indices``."""
    return fold(torch.full_like(indices, _signed(seed)), indices)


def fold(key: Tensor, value: int | Tensor) -> Tensor:
    """Return the key of sub-stream ``value`` of each key."""
    if isinstance(value, Tensor):
        return _mix(key ^ _mix(value + _signed(_GOLDEN)))
    # Mix a number on the host: a copy to the device would make the host wait.
    return _mix(key ^ _mix_number(value + _GOLDEN))


def uniform(key: Tensor, *shape: int) -> Tensor:
    """Draw uniform numbers in [0, 1): float32 of shape ``(*key.shape, *shape)``."""
    high, _ = _words(key, math.prod(shape))
    # 24 bits, so that rounding to float32 cannot reach 1.
    return ((high >> 8).double() * 2.0**-24).float().reshape(*key.shape, *shape).to(key.device)  # type: ignore[no-any-return]


def normal(key: Tensor, *shape: int) -> Tensor:
    """Draw standard normal numbers (Box-Muller): float32 of shape ``(*key.shape, *shape)``."""
    count = math.prod(shape)
    high, low = _words(key, (count + 1) // 2)
    radius = (-2.0 * ((high.double() + 1.0) * 2.0**-32).log()).sqrt()
    angle = low.double() * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(-2)
    return pairs[..., :count].float().reshape(*key.shape, *shape).to(key.device)


def permutation(key: Tensor, count: int) -> Tensor:
    """Draw a permutation of ``0 .. count - 1`` for one key (a scalar): int64 ``(count,)``, equal in every torch."""
    high, low = _words(key, count)
    return ((high << 31) | (low >> 1)).argsort(stable=True)  # type: ignore[no-any-return]


# A custom operator keeps torch.compile out: fused by torch 2.13 on CPUs, some numbers differ.
@torch.library.custom_op("pra::random_words", mutates_args=())
def _words(key: Tensor, count: int) -> Tensor:
    """Return two 32-bit words for each of ``count`` counters: int64 ``(2, *key.shape, count)``."""
    if key.device.type == "mps":  # MPS lacks float64
        key = key.cpu()
    counter = torch.arange(1, count + 1, device=key.device) * _signed(_GOLDEN)
    bits = _mix(key.unsqueeze(-1) + counter)
    return torch.stack([(bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF])


@_words.register_fake
def _(key: Tensor, count: int) -> Tensor:
    return key.new_empty((2, *key.shape, count), device="cpu" if key.device.type == "mps" else None)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64. int64 products wrap; a mask makes the shifts logical."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix_number(x: int) -> int:
    """Apply the same finaliser to one number, on the host."""
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ (x >> 30)) * _MIX1) & mask
    x = ((x ^ (x >> 27)) * _MIX2) & mask
    return _signed(x ^ (x >> 31))


def _signed(value: int) -> int:
    """Return the lowest 64 bits of ``value`` as a signed number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
