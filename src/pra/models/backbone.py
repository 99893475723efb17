"""The backbone ``F``: prefix tokens of the condition and the patches before ``i`` in, ``h_i`` out (pixel-in)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pra.config import ModelConfig
from pra.models.cache import KVCache, NewCache
from pra.models.rope import raster_positions
from pra.models.transformer import Transformer


class Backbone(nn.Module):
    """A causal transformer over the prefix tokens of the condition, then raw pixel patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.backbone.width
        self.prefix = config.class_tokens
        self.patch_in = nn.Linear(config.patch_dim, width)
        # The last patch is never an input.
        positions = raster_positions(config.grid, prefix=self.prefix)[:-1]
        self.transformer = Transformer(config.backbone, positions)
        # A token sits where its patch is; this tells the head which patch comes next (as SphereAR does).
        self.next_position = nn.Parameter(torch.empty(config.num_patches, width))

    def new_cache(self, batch: int, kind: NewCache = KVCache) -> KVCache:
        """An empty cache for ``batch`` sequences (:meth:`pra.models.transformer.Transformer.new_cache`)."""
        return self.transformer.new_cache(batch, kind)

    def forward(self, prefix: Tensor | None, patches: Tensor, cache: KVCache | None = None) -> Tensor:
        """``h`` of the first ``n + 1`` patches; without a prefix, ``h`` after one patch more.

        Args:
            prefix: ``(S * B, K, D)``, the tokens of the condition, of ``S`` streams that share their patches; ``None``
                where ``cache`` holds them.
            patches: ``(B, n, P)`` in [-1, 1], the first ``n < N`` of the raster; without a prefix one patch, the token
                that ``cache`` points at.
            cache: for ``S * B`` sequences, to fill and to go on from.

        Returns:
            ``h_1 .. h_{n+1}``: ``(S * B, n + 1, D)``; ``(S * B, 1, D)`` without a prefix.
        """
        tokens = self.patch_in(patches)
        if prefix is None:
            assert cache is not None, "a patch without a prefix needs the cache that holds it"
            h = self.transformer(tokens.repeat(cache.batch // len(tokens), 1, 1), cache)
            return h + self.next_position[cache.positions(1, 1 - self.prefix)]  # type: ignore[no-any-return]
        tokens = torch.cat([prefix, tokens.repeat(len(prefix) // len(tokens), 1, 1)], dim=1)
        h = self.transformer(tokens, cache)[:, self.prefix - 1 :]
        return h + self.next_position[: h.shape[1]]  # type: ignore[no-any-return]
