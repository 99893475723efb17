"""The backbone ``F``: class tokens and the patches before ``i`` in, the condition ``h_i`` out (pixel-in)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pra.config import ModelConfig
from pra.nn.rope import raster_positions
from pra.nn.transformer import KVCache, Transformer


class Backbone(nn.Module):
    """A causal transformer over ``class_tokens`` learned tokens of the class, then raw pixel patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.backbone.width
        self.class_tokens = config.class_tokens
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.class_tokens * width)
        self.patch_in = nn.Linear(config.patch_dim, width)
        # The last patch is never an input.
        positions = raster_positions(config.grid, prefix=config.class_tokens)[:-1]
        self.transformer = Transformer(config.backbone, positions)
        # A token sits where its patch is; this tells the head which patch comes next (as SphereAR does).
        self.next_position = nn.Parameter(torch.empty(config.num_patches, width))

    def new_cache(self, batch: int, multiple: int = 1) -> KVCache:
        """An empty cache for ``batch`` sequences; see :meth:`pra.nn.transformer.Transformer.new_cache`."""
        return self.transformer.new_cache(batch, multiple)

    def forward(self, labels: Tensor, patches: Tensor, cache: KVCache | None = None) -> Tensor:
        """Conditions of the first ``n + 1`` patches.

        Args:
            labels: ``(B,)`` in ``[0, num_classes]``; ``num_classes`` is the null class.
            patches: ``(B, n, P)`` in [-1, 1], the first ``n < N`` of the raster.
            cache: an empty cache to fill, for :meth:`step` to go on from.

        Returns:
            ``h_1 .. h_{n+1}``: ``(B, n + 1, D)``.
        """
        h = self.transformer(self.tokens(labels, patches), cache)[:, self.class_tokens - 1 :]
        return h + self.next_position[: h.shape[1]]  # type: ignore[no-any-return]

    def tokens(self, labels: Tensor, patches: Tensor) -> Tensor:
        """What the transformer reads: of the class, then of the patches; ``(B, class_tokens + n, D)``."""
        classes = self.class_embedding(labels).view(labels.shape[0], self.class_tokens, -1)
        return torch.cat([classes, self.patch_in(patches)], dim=1)

    def step(self, patch: Tensor, cache: KVCache) -> Tensor:
        """The next condition ``(B, 1, D)`` after one more patch ``(B, 1, P)``."""
        h = self.transformer(self.patch_in(patch), cache)
        position = cache.length - self.class_tokens
        return h + self.next_position[position]  # type: ignore[no-any-return]
