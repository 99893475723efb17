"""Key-value caches: they decide how keys and values are stored; modules only compute.

The caller sets the position of the next tokens (:meth:`KVCache.seek`), so a step may run twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pra.config import TransformerConfig

ALIGNED = 8
"""Divisor of a mask's length: CUDA's attention would copy any other mask into a longer one in every layer."""


class KVCache:
    """Keys and values of every layer for ``batch`` sequences of ``capacity`` tokens, allocated once.

    A step adds ``group`` tokens, which attend to each other.

    Attributes:
        keys: ``(depth, batch, heads, capacity, head_dim)``, as are ``values``.
        length: the number of stored tokens.
        bound: the number of tokens that attention reads in a step: the stored ones and the new ones.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        group: int = 1,
    ) -> None:
        shape = (config.depth, batch, config.heads, capacity, config.width // config.heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.batch, self.capacity, self.group = batch, capacity, group
        self.length, self.bound = 0, group

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def seek(self, length: int) -> None:
        """Store the next tokens after the first ``length`` tokens."""
        self.length, self.bound = length, length + self.group

    def clear(self) -> None:
        """Forget every token."""
        self.seek(0)

    def positions(self, count: int, offset: int = 0) -> slice | Tensor:
        """Return the rows of the next ``count`` tokens in a table whose row 0 belongs to token ``-offset``."""
        start = self.length + offset
        return slice(start, start + count)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values ``(batch, heads, T, head_dim)`` of a layer's next tokens.

        Returns:
            The keys and values that the ``T`` queries attend to, and a mask where plain causal attention would be
            wrong: ``(T, tokens)`` booleans, or numbers to add to the scores.
        """
        count = keys.shape[2]
        end = self.length + count
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        mask = None
        if count > 1 and (self.length or self.group > 1):
            mask = group_mask(count, self.length, self.group, keys.device)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end], mask


def group_mask(count: int, before: int, group: int, device: torch.device) -> Tensor:
    """Return the mask of ``count`` tokens after the first ``before``: ``(count, before + count)`` booleans.

    A token attends to all tokens up to the end of its own group.
    """
    ends = before + (torch.arange(count, device=device) // group + 1) * group
    return torch.arange(before + count, device=device) < ends.unsqueeze(1)


class StaticCache(KVCache):
    """A cache for compiled and captured steps: a step of ``group`` tokens has the same shapes at many positions.

    The position is a tensor, so that one CUDA graph or compiled function serves many positions. Attention reads
    ``bound`` tokens, a multiple of ``bucket`` (by default the whole cache); a mask hides the tokens that are not stored
    yet. A prefix is stored as in :class:`KVCache`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        group: int = 1,
        bucket: int | None = None,
    ) -> None:
        multiple = bucket or (ALIGNED if device.type == "cuda" else 1)
        super().__init__(config, batch, -(-capacity // multiple) * multiple, device, dtype, group)
        self.bucket = bucket or self.capacity
        self._first = torch.arange(group, dtype=torch.int64, device=device)
        self.position = self._first.clone()
        # Numbers to add to the scores: every layer would convert booleans into them.
        self.mask = torch.zeros(1, 1, 1, self.capacity, dtype=dtype, device=device)
        self.seek(0)

    def seek(self, length: int) -> None:
        super().seek(length)
        self.bound = min(self.capacity, -(-(length + self.group) // self.bucket) * self.bucket)
        torch.add(self._first, length, out=self.position)
        self.mask.fill_(-math.inf)
        self.mask[..., : length + self.group] = 0.0

    def clear(self) -> None:
        super().clear()
        # Zero the cache: masked entries must be finite, since 0 * nan is nan.
        self.keys.zero_()
        self.values.zero_()

    def positions(self, count: int, offset: int = 0) -> slice | Tensor:
        return self.position + offset if count == self.group else super().positions(count, offset)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if keys.shape[2] != self.group:
            return super().extend(layer, keys, values)
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        seen = slice(self.bound)
        return self.keys[layer, :, :, seen], self.values[layer, :, :, seen], self.mask[..., seen]


class Masked:
    """The interface of a cache for one pass over whole sequences under a mask.

    ``mask`` holds booleans, True where a query may attend to a key. It broadcasts to ``(B, heads, T, T)``; every query
    needs at least one key.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def positions(self, count: int, offset: int = 0) -> slice:
        """Return the rows of the first ``count`` tokens (:class:`KVCache`)."""
        return slice(count)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys, the values, and the mask (:class:`KVCache`)."""
        return keys, values, self.mask


NewCache: TypeAlias = Callable[[TransformerConfig, int, int, torch.device, torch.dtype, int], KVCache]
"""A function that makes a cache from the arguments of :class:`KVCache`."""
