"""The codec: the encoder ``G`` from patches to states, and the causal decoder ``D`` from states to pixels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import CodecConfig, DeblockConfig, ModelConfig
from pra.models.cache import KVCache, NewCache
from pra.models.transformer import RMSNorm, SwiGLU, Transformer, raster_positions


class ResidualMLP(nn.Module):
    """A residual block ``x + swiglu(norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 3 * width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., width)`` to the same shape."""
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class StateEncoder(nn.Module):
    """The encoder ``G(x_i, h_i)``: a residual MLP per patch. Without ``sees_condition`` it ignores ``h``."""

    def __init__(self, model: ModelConfig, codec: CodecConfig) -> None:
        super().__init__()
        width = codec.encoder.width
        self.patch_in = nn.Linear(model.patch_dim, width)
        self.condition_in = nn.Linear(model.backbone.width, width, bias=False) if codec.encoder.sees_condition else None
        self.blocks = nn.ModuleList(ResidualMLP(width) for _ in range(codec.encoder.depth))
        self.norm = RMSNorm(width, eps=1e-6)
        self.out = nn.Linear(width, codec.state_dim)

    def forward(self, patches: Tensor, conditions: Tensor | None) -> Tensor:
        """Return states ``(B, n, d)``, not yet normalised, of patches ``(B, n, P)`` and conditions ``(B, n, D)``."""
        x = self.patch_in(patches).to(self.norm.weight.dtype)
        if self.condition_in is not None:
            assert conditions is not None, "this encoder sees the condition: pass h"
            x = x + self.condition_in(conditions)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))  # type: ignore[no-any-return]


class PixelDecoder(nn.Module):
    """The decoder ``x^_i = D(z_<=i)``: causal, so it runs in parallel in training and step by step in sampling.

    The transformer has one token per patch; the patches of a group attend to each other, as their states are sampled
    together. Without context ``x^_i = D(z_i)``: every group is a separate sequence.
    """

    def __init__(self, model: ModelConfig, codec: CodecConfig) -> None:
        super().__init__()
        self.context = codec.context
        self.state_in = nn.Linear(codec.state_dim, codec.decoder.width)
        positions = raster_positions(model.grid, group=model.group)
        self.transformer = Transformer(codec.decoder, positions, model.group_size)
        self.out = nn.Linear(codec.decoder.width, model.patch_dim)

    def forward(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """Decode ``(B, n, k * d)`` to ``(B, n, k * P)``; with a cache, the states after those in the cache."""
        (b, n, numbers), k = states.shape, self.transformer.group
        tokens = self.state_in(states.reshape(b, n * k, numbers // k))
        if self.context:
            tokens = self.transformer(tokens, cache)
        else:
            tokens = self.transformer(tokens.view(b * n, k, tokens.shape[2])).view_as(tokens)
        pixels = self.out(tokens)
        return pixels.view(b, n, k * pixels.shape[2])  # type: ignore[no-any-return]


class DeblockingFilter(nn.Module):
    """A filter that corrects each patch of a finished picture from the pixels around it. It starts as the identity."""

    def __init__(self, model: ModelConfig, config: DeblockConfig) -> None:
        super().__init__()
        self.patch_size, self.margin = model.patch_size, config.margin
        window = (model.patch_size + 2 * config.margin) ** 2 * model.channels
        self.window_in = nn.Linear(window, config.width)
        self.blocks = nn.ModuleList(ResidualMLP(config.width) for _ in range(config.depth))
        self.out = nn.Linear(config.width, model.patch_dim)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the corrections ``(B, n, P)`` of pictures ``(B, C, h, w)`` of ``n`` patches, padded with zeros."""
        p, m = self.patch_size, self.margin
        windows = F.unfold(F.pad(pictures, (m, m, m, m)), p + 2 * m, stride=p)
        x = self.window_in(windows.transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.out(x)  # type: ignore[no-any-return]


class StateCodec(nn.Module):
    """A codec of learned low-dimensional states.

    Patches, states and conditions are those of groups: ``(B, n, k * P)``, ``(B, n, k * d)`` and ``(B, n, D)``. The
    encoder reads each patch separately, and normalises each state separately.
    """

    def __init__(self, model: ModelConfig, codec: CodecConfig) -> None:
        super().__init__()
        self.state_dim, self.group_size = codec.state_dim, model.group_size
        self.sees_condition = codec.encoder.sees_condition
        self.encoder = StateEncoder(model, codec)
        self.decoder = PixelDecoder(model, codec)
        self.deblock = DeblockingFilter(model, codec.deblock) if codec.deblock else None

    def new_cache(self, batch: int, kind: NewCache = KVCache) -> KVCache | None:
        """Return an empty decoder cache for ``batch`` sequences, or ``None`` where the decoder has no context."""
        return self.decoder.transformer.new_cache(batch, kind) if self.decoder.context else None

    def encode(self, patches: Tensor, conditions: Tensor | None) -> Tensor:
        """Return ``z = norm(G(x, h))``, ``(B, n, d)``, of patches ``(B, n, P)`` and conditions ``(B, n, D)``.

        ``conditions`` may be None if the encoder does not read them.
        """
        (b, n, numbers), k = patches.shape, self.group_size
        if k > 1 and conditions is not None:
            conditions = conditions.repeat_interleave(k, dim=1)
        states = self.encoder(patches.reshape(b, n * k, numbers // k), conditions)
        return self.normalise(states.reshape(b, n, k * self.state_dim))

    def normalise(self, states: Tensor) -> Tensor:
        """Normalise each state to zero mean and ``||z_i|| = sqrt(d)``, in float32 (LayerNorm without affine)."""
        single = states.float().reshape(*states.shape[:-1], self.group_size, self.state_dim)
        return F.layer_norm(single, (self.state_dim,)).flatten(-2)

    def decode(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return ``D(z)``, ``(B, n, P)``, unclamped, of states ``(B, n, d)``.

        With a cache, the states are those after the states in the cache.
        """
        return self.decoder(states, cache)  # type: ignore[no-any-return]


class IdentityCodec(nn.Module):
    """The interface of :class:`StateCodec` without parameters: the state is the patch, as in pixel AR."""

    sees_condition = False
    deblock = None

    def new_cache(self, batch: int, kind: NewCache = KVCache) -> None:
        """Return None: a patch depends on its own state only."""
        return None

    def encode(self, patches: Tensor, conditions: Tensor | None) -> Tensor:
        """Return the patches."""
        return patches

    def normalise(self, states: Tensor) -> Tensor:
        """Return the states unchanged: pixels are not normalised."""
        return states

    def decode(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the states."""
        return states
