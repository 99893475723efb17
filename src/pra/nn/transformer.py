"""A pre-norm transformer (RMSNorm, SwiGLU, 2-D RoPE, query-key norm), causal, and the cache it decodes with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import TransformerConfig
from pra.nn.rope import rotary_table, rotate


class KVCache:
    """Keys and values of every layer for one batch, allocated once; owned by whoever decodes, never by a module.

    Args:
        config: the transformer it serves.
        batch: sequences decoded side by side.
        capacity: tokens it can hold.
        device: where it lies.
        dtype: of what it holds.
    """

    def __init__(
        self, config: TransformerConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.depth, batch, config.heads, capacity, config.width // config.heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores ``(B, heads, T, head_dim)`` behind the tokens so far and returns all of them."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the arithmetic of its input: under autocast a float32 weight would keep torch off its fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to the same."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """``W2 (silu(W1a x) * W1b x)`` (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.into = nn.Linear(width, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to the same."""
        gate, value = self.into(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention. Queries and keys are RMS-normalised (arXiv 2302.05442): stable in bfloat16.

    Where it is not ``causal``, every token sees every other, and there is no cache.
    """

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = RMSNorm(width // heads, eps=1e-6)
        self.key_norm = RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """``(B, T, width)`` to the same; ``rotary`` is the table of these ``T`` tokens."""
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = rotate(self.query_norm(q), rotary)
        k = rotate(self.key_norm(k), rotary)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # The T queries are the last of the keys so far; a mask only where it would hide something.
        keys = k.shape[2]
        mask = None if t in (1, keys) else torch.ones(t, keys, dtype=torch.bool, device=x.device).tril(keys - t)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and 1 < t == keys)
        return self.out(y.transpose(1, 2).reshape(b, t, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + swiglu(norm(x))``; 12 width^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 8 * width // 3)

    def forward(self, x: Tensor, rotary: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        """``(B, T, width)`` to the same."""
        x = x + self.attention(self.attention_norm(x), rotary, cache, layer)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """The stack of blocks, its rotary table and the final norm.

    Args:
        config: sizes.
        positions: row and column of each token, ``(T, 2)``, see :func:`pra.nn.rope.raster_positions`.
    """

    rotary: Tensor

    def __init__(self, config: TransformerConfig, positions: Tensor) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, eps=1e-6)
        self.register_buffer("rotary", rotary_table(positions, config.width // config.heads), persistent=False)

    def new_cache(self, batch: int, multiple: int = 1) -> KVCache:
        """An empty cache for ``batch`` whole sequences, on this module's device, in the dtype attention runs in.

        It holds a ``multiple`` of so many tokens: as many as a sequence has, rounded up.
        """
        weight = self.norm.weight
        lower = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if lower else weight.dtype
        capacity = -(-self.rotary.shape[1] // multiple) * multiple
        return KVCache(self.config, batch, capacity, weight.device, dtype)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """``(B, T, width)`` to the same shape; with a cache, ``x`` are the tokens after those in it."""
        start = cache.length if cache else 0
        end = start + x.shape[1]
        assert end <= self.rotary.shape[1], f"a sequence of {self.rotary.shape[1]} tokens asked to hold {end}"
        rotary = self.rotary[:, start:end]
        # The residual stream keeps the weights' precision under autocast, token by token as in parallel.
        x = x.to(self.norm.weight.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, cache, layer)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)  # type: ignore[no-any-return]
