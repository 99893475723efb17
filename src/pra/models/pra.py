"""PRA: the model of backbone, head, codec and auxiliary predictor."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pra.config import ModelConfig, Solver
from pra.models.base import ImageModel, NoDraws, initialise
from pra.models.cache import KVCache, NewCache
from pra.models.head import FlowHead
from pra.models.states import IdentityCodec, StateCodec
from pra.models.text import condition_of
from pra.models.transformer import Transformer, raster_positions


class Backbone(nn.Module):
    """The backbone ``F``: a causal transformer over the prefix tokens of the condition, then raw pixel patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.backbone.width
        self.prefix = config.class_tokens + config.text_tokens
        self.patch_in = nn.Linear(config.group_dim, width)
        # The last patch is never an input.
        positions = raster_positions(config.group_grid, prefix=self.prefix)[:-1]
        self.transformer = Transformer(config.backbone, positions)
        # A token has the position of its own patch. This tells the head which patch comes next (as in SphereAR).
        self.next_position = nn.Parameter(torch.empty(config.num_groups, width))

    def new_cache(self, batch: int, kind: NewCache = KVCache) -> KVCache:
        """Return an empty cache for ``batch`` sequences."""
        return self.transformer.new_cache(batch, kind)

    def forward(self, prefix: Tensor | None, patches: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return ``h`` of the first ``n + 1`` patches; without a prefix, ``h`` after one more patch.

        Args:
            prefix: ``(S * B, K, D)``, the tokens of the condition, for ``S`` streams that share their patches; ``None``
                where ``cache`` already holds them.
            patches: ``(B, n, P)`` in [-1, 1], the first ``n < N`` of the raster; without a prefix a single patch, at
                the position of ``cache``.
            cache: for ``S * B`` sequences; the tokens are added to it.

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


class PRA(ImageModel):
    """The model of docs/method.md. The autoregressive baselines are other configurations of this class.

    The initial weights depend on ``seed`` alone; None leaves them uninitialised, to be loaded.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        self.prefix = config.class_tokens + config.text_tokens
        with NoDraws():
            self.condition = condition_of(config, config.class_tokens, config.backbone.width)
            self.backbone = Backbone(config)
            self.head = FlowHead(config)
            self.shortcut = FlowHead(config, spans=True) if config.head.shortcut else None
            self.codec = StateCodec(config, config.codec) if config.codec else IdentityCodec()
            # Used in training only. L_aux: h_i predicts x_i, normalised per patch.
            self.auxiliary = nn.Linear(config.backbone.width, config.group_dim)
        # Modulations and outputs start at zero (DiT), so the initial head returns zero.
        zeros = [layer for head in (self.head, self.shortcut) if head is not None for layer in head.zeros()]
        if self.codec.deblock is not None:
            zeros.append(self.codec.deblock.out)
        if seed is not None:
            initialise(self, seed, [self.backbone.next_position, *self.condition.embeddings], zeros)

    @property
    def blocks(self) -> nn.ModuleList:
        """The backbone's blocks."""
        return self.backbone.transformer.blocks

    def head_for(self, solver: Solver) -> FlowHead:
        """Return the head that a solver integrates: the second head for :attr:`Solver.SHORTCUT`."""
        if solver is not Solver.SHORTCUT:
            return self.head
        assert self.shortcut is not None, "pra.config.check_sampling refuses such settings"
        return self.shortcut

    def is_told(self, solver: Solver) -> bool:
        """Return whether the head that a solver integrates reads the guidance scale."""
        return self.head_for(solver).scale_in is not None

    def conditions(self, labels: Tensor, patches: Tensor) -> Tensor:
        """Return ``h = F(c, x)``, ``(B, n + 1, D)``, of labels or rows and of the first ``n`` patches ``(B, n, P)``."""
        return self.backbone(self.condition(labels), patches)  # type: ignore[no-any-return]

    def write(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """Decode states ``(B, n, d)`` to float32 pixels ``(B, n, P)``, clamped to [-1, 1].

        Training and sampling use this same path.
        """
        return self.codec.decode(states, cache).float().clamp(-1.0, 1.0)

    def picture(self, patches: Tensor) -> Tensor:
        """Return the pictures ``(B, C, rows * p, W)`` of patches ``(B, rows * columns, P)``.

        A deblocking filter is applied if the model has one; its output is not clamped.
        """
        pictures = self.unpatchify(patches)
        if self.codec.deblock is None:
            return pictures
        return pictures + self.unpatchify(self.codec.deblock(pictures).float(), group=(1, 1))

    def clean_conditions(self, labels: Tensor, patches: Tensor) -> Tensor | None:
        """Return ``F(c, x)``, ``(B, n, D)`` for ``n`` patches; None where the encoder does not read it."""
        return self.conditions(labels, patches[:, :-1]) if self.codec.sees_condition else None

    def read(self, labels: Tensor, patches: Tensor, t: Tensor | None = None) -> None:
        """Run the backbone; the last patch is never an input."""
        self.conditions(labels, patches[:, :-1])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images encoded and decoded (:meth:`ImageModel.reconstruct`)."""
        patches = self.patchify(images)
        states = self.codec.encode(patches, self.clean_conditions(labels, patches))
        return self.picture(self.write(states)).clamp(-1.0, 1.0)
