"""Two-dimensional rotary position embedding (RoFormer, arXiv 2104.09864; half of each head per axis)."""

from __future__ import annotations

import torch
from torch import Tensor


def raster_positions(grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Row and column of every token, ``(prefix + rows*columns, 2)``: the prefix at the origin, patches from 1."""
    rows, columns = torch.meshgrid(torch.arange(1, grid[0] + 1), torch.arange(1, grid[1] + 1), indexing="ij")
    patches = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    return torch.cat([torch.zeros(prefix, 2, dtype=patches.dtype), patches])


def rotary_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Cosines and sines of the rotation of every token: ``(2, T, head_dim / 2)``, float32."""
    frequencies = base ** (-torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))
    angles = (positions.double().unsqueeze(-1) * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the pairs ``(x[..., k], x[..., k + head_dim/2])`` of ``x`` ``(B, heads, T, head_dim)``."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
