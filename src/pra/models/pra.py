"""PRA: backbone, head, codec and the auxiliary predictor, composed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pra.config import ModelConfig, Solver
from pra.models.backbone import Backbone
from pra.models.base import ImageModel, NoDraws, initialise
from pra.models.cache import KVCache
from pra.models.condition import ClassCondition
from pra.models.head import FlowHead
from pra.models.states import build_codec


class PRA(ImageModel):
    """The model of docs/method.md. The autoregressive baselines are other configurations of it.

    Args:
        config: sizes and choices.
        seed: of the initial weights. They do not depend on, nor disturb, torch's global random state. With None they
            are left as memory is, to be loaded.
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        with NoDraws():
            self.condition = ClassCondition(config.num_classes, config.class_tokens, config.backbone.width)
            self.backbone = Backbone(config)
            self.head = FlowHead(config)
            self.shortcut = FlowHead(config, spans=True) if config.head.shortcut else None
            self.codec = build_codec(config)
            # L_aux: h_i predicts the per-patch-normalised x_i. Used in training only.
            self.auxiliary = nn.Linear(config.backbone.width, config.patch_dim)
        # What modulates the head, and its output, starts at zero (DiT): the head begins as the zero field.
        zeros = [layer for head in (self.head, self.shortcut) if head is not None for layer in head.zeros()]
        if seed is not None:
            initialise(self, seed, [self.backbone.next_position], zeros)

    @property
    def blocks(self) -> nn.ModuleList:
        """The backbone's."""
        return self.backbone.transformer.blocks

    @property
    def prefix(self) -> int:
        """The condition's."""
        return self.condition.count

    def head_for(self, solver: Solver) -> FlowHead:
        """The head that a solver integrates: the second one for steps that it has learnt."""
        if solver is not Solver.SHORTCUT:
            return self.head
        assert self.shortcut is not None, "settings are checked before: pra.config.check_sampling"
        return self.shortcut

    def conditions(self, labels: Tensor, patches: Tensor) -> Tensor:
        """``h = F(c, x)``: labels ``(B,)`` and the first ``n`` patches ``(B, n, P)`` to ``h_1 .. h_{n+1}``."""
        return self.backbone(self.condition(labels), patches)  # type: ignore[no-any-return]

    def write(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """The one path from states to pixels, in training and in sampling: decoded, clamped to [-1, 1], float32."""
        return self.codec.decode(states, cache).float().clamp(-1.0, 1.0)

    def clean_conditions(self, labels: Tensor, patches: Tensor) -> Tensor | None:
        """``F(c, x)`` for the encoder, ``(B, n, D)`` for ``n`` patches; None where the encoder does not see it."""
        if not self.codec.sees_condition:
            return None
        return self.conditions(labels, patches[:, :-1])

    def read(self, labels: Tensor, patches: Tensor, t: Tensor | None = None) -> None:
        """Run the backbone; the last patch is never an input."""
        self.conditions(labels, patches[:, :-1])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """As in :class:`ImageModel`."""
        patches = self.patchify(images)
        states = self.codec.encode(patches, self.clean_conditions(labels, patches))
        return self.unpatchify(self.write(states))
