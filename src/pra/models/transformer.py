"""A causal pre-norm transformer: RMSNorm, SwiGLU, query-key norm, and 2-D rotary positions (half a head per axis)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import TransformerConfig
from pra.models.cache import KVCache, Masked, NewCache, group_mask


def raster_positions(grid: tuple[int, int], prefix: int = 0, group: tuple[int, int] = (1, 1)) -> Tensor:
    """Return row and column of each token, ``(prefix + rows * columns, 2)``: 0 for the prefix, from 1 for patches.

    Groups of ``group`` rows and columns are in raster order, and so are the patches of each group.
    """
    rows, columns = torch.meshgrid(torch.arange(1, grid[0] + 1), torch.arange(1, grid[1] + 1), indexing="ij")
    down, across = group
    patches = torch.stack([rows, columns], dim=-1).view(grid[0] // down, down, grid[1] // across, across, 2)
    patches = patches.transpose(1, 2).reshape(-1, 2)
    return torch.cat([torch.zeros(prefix, 2, dtype=patches.dtype), patches])


def rotary_table(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """Return cosines and sines of each token's rotation (arXiv 2104.09864): float32 ``(2, T, head_dim / 2)``."""
    frequencies = base ** (-torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))
    angles = (positions.double().unsqueeze(-1) * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs ``(x[..., k], x[..., k + head_dim/2])`` of ``x`` ``(B, heads, T, head_dim)``."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input. Torch's fused kernel needs a weight of that dtype, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """The gated MLP ``W2 (silu(W1a x) * W1b x)`` (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.into = nn.Linear(width, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        gate, value = self.into(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention, causal or bidirectional; the latter does not take a cache.

    Queries and keys are RMS-normalised (arXiv 2302.05442), which is stable in bfloat16.
    """

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = RMSNorm(width // heads, eps=1e-6)
        self.key_norm = RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | Masked | None = None, layer: int = 0) -> Tensor:
        """Map ``(B, T, width)`` to the same shape; ``rotary`` is the table of these ``T`` tokens."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = rotate(self.query_norm(q), rotary)
        k = rotate(self.key_norm(k), rotary)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(layer, k, v)
        causal = self.causal and mask is None and t > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(b, t, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A block of ``x + attention(norm(x))``, then ``x + swiglu(norm(x))``; it has 12 width^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 8 * width // 3)

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | Masked | None, layer: int) -> Tensor:
        """Map ``(B, T, width)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary, cache, layer)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A stack of blocks with a rotary table and a final norm; ``positions`` are from :func:`raster_positions`.

    Attention is causal over groups; the ``group`` tokens of a group attend to each other.
    """

    rotary: Tensor

    def __init__(self, config: TransformerConfig, positions: Tensor, group: int = 1) -> None:
        super().__init__()
        self.config, self.group = config, group
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, eps=1e-6)
        self.register_buffer("rotary", rotary_table(positions, config.width // config.heads), persistent=False)

    def new_cache(self, batch: int, kind: NewCache = KVCache) -> KVCache:
        """Return an empty cache for ``batch`` whole sequences, in the dtype that attention runs in."""
        weight = self.norm.weight
        lower = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if lower else weight.dtype
        return kind(self.config, batch, self.rotary.shape[1], weight.device, dtype, self.group)

    def forward(self, x: Tensor, cache: KVCache | Masked | None = None) -> Tensor:
        """Map ``(B, T, width)`` to the same shape; with a cache, ``x`` are the tokens after those in the cache."""
        if cache is None and self.group > 1:
            cache = Masked(group_mask(x.shape[1], 0, self.group, x.device))
        rotary = self.rotary[:, slice(x.shape[1]) if cache is None else cache.positions(x.shape[1])]
        assert rotary.shape[1] == x.shape[1], f"this transformer has {self.rotary.shape[1]} tokens, no more"
        # Keep the residual stream in the weights' precision under autocast, with a cache and without.
        x = x.to(self.norm.weight.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer)
        return self.norm(x)  # type: ignore[no-any-return]
