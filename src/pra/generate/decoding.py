"""Decoding patch by patch with the model's own modules: the plain path. Exact rollouts take it in training, and the
engine of :mod:`pra.generate.engine`, which the sampler takes, is held to it."""

from __future__ import annotations

import torch
from torch import Tensor

from pra import solvers
from pra.config import SamplingConfig, Solver
from pra.models import PRA, Model
from pra.models.head import FlowHead
from pra.nn.transformer import KVCache


class Decoding:
    """One batch of images on its way, patch by patch: the caches, and the condition of the next patch.

    With ``guided`` the backbone runs twice the batch, with the labels and with the null class. Both streams read
    the same generated pixels, so the decoder runs once.

    Args:
        model: in evaluation or training; nothing here depends on the mode.
        labels: ``(B,)``.
        guided: whether to keep the unconditional stream.
        prefix: ``(B, n, P)`` true patches to go on from, ``n < N``.
        head: in place of the model's first.
    """

    def __init__(
        self,
        model: PRA,
        labels: Tensor,
        guided: bool = False,
        prefix: Tensor | None = None,
        head: FlowHead | None = None,
    ) -> None:
        self.model, self.head = model, model.head if head is None else head
        self.streams = 2 if guided else 1
        batch = labels.shape[0]
        if prefix is None:
            prefix = labels.new_empty(batch, 0, model.config.patch_dim, dtype=torch.float32)
        self.backbone_cache = model.backbone.new_cache(self.streams * batch)
        self.decoder_cache = model.codec.new_cache(batch)
        self.position = prefix.shape[1]
        self._set_condition(prefill(model, labels, prefix, self.backbone_cache, self.decoder_cache))

    def velocity(self, scale: float, span: Tensor | None = None) -> solvers.Velocity:
        """The head's field at the current position under guidance ``v_u + scale (v_c - v_u)`` (2207.12598); with a
        ``span``, of shape ``(1, 1)``, the mean velocities over steps of it (:class:`pra.models.head.FlowHead`)."""
        head, condition = self.head, self.condition
        if self.streams == 1:
            return lambda z, t: head(z, t, condition, span)

        return lambda z, t: guided(head(z.repeat(2, 1, 1), t, condition, span), scale)

    def append(self, state: Tensor) -> Tensor:
        """Writes the patch ``(B, 1, P)`` of a state ``(B, 1, d)`` and reads it as the next input."""
        patch = self.model.write(state, self.decoder_cache)
        self.position += 1
        if self.position < self.model.config.num_patches:
            inputs = patch.repeat(self.streams, 1, 1)
            self._set_condition(self.model.backbone.step(inputs, self.backbone_cache))
        return patch

    def _set_condition(self, h: Tensor) -> None:
        # Projected once here; every evaluation of the solver shares it.
        self.condition = self.head.condition(h)


def chosen_head(model: PRA, config: SamplingConfig) -> FlowHead:
    """The head that the settings ask."""
    if config.solver is not Solver.SHORTCUT:
        return model.head
    assert model.shortcut is not None, "settings are checked before: pra.config.check_sampling"
    return model.shortcut


def prefill(
    model: PRA, labels: Tensor, prefix: Tensor, backbone_cache: KVCache, decoder_cache: KVCache | None
) -> Tensor:
    """Fills empty caches with true patches, all at once.

    Args:
        model: whose caches they are.
        labels: ``(B,)``.
        prefix: ``(B, n, P)`` patches in [-1, 1], ``n < N``.
        backbone_cache: for ``B`` sequences, or for ``2 B`` with the null class as a second stream.
        decoder_cache: for ``B`` sequences.

    Returns:
        The condition of the next patch, ``(streams * B, 1, D)``, the streams one after the other.
    """
    batch = len(labels)
    streams = backbone_cache.keys.shape[1] // batch
    conditions: Tensor = model.backbone(
        labels_of_streams(model, labels, streams), prefix.repeat(streams, 1, 1), backbone_cache
    )
    if prefix.shape[1]:
        # The decoder reads the states of the true patches, encoded as in training.
        model.codec.decode(model.codec.encode(prefix, conditions[:batch, :-1]), decoder_cache)
    return conditions[:, -1:]


def labels_of_streams(model: Model, labels: Tensor, streams: int) -> Tensor:
    """The labels ``(B,)``; with two streams the null class as often behind them."""
    return labels if streams == 1 else torch.cat([labels, torch.full_like(labels, model.config.null_class)])


def guided(both: Tensor, scale: float | Tensor) -> Tensor:
    """``v_u + scale (v_c - v_u)`` of the conditional and the unconditional field, stacked along the batch."""
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
