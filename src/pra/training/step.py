"""The training step: loss, gradients, clipping, optimizer and averages. Training, `pra bench train` and the timing of
models for one's own pictures all run this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from pra.config import Rollout, TrainConfig
from pra.method.objectives import LossTerm, Perceptual, losses_of
from pra.models import Model
from pra.training.averages import EMA
from pra.training.optimizer import build_optimizer, whole
from pra.training.parallel import SharedLoss
from pra.utils.device import autocast
from pra.utils.distributed import ALONE, World

MicroBatch = tuple[Tensor, Tensor, Tensor]
"""Images ``(B, C, H, W)`` in [-1, 1], labels ``(B,)`` and keys ``(B,)``, on the device."""


class Step:
    """A model in training: its loss, shared by all processes, its optimizer, and its averages.

    Under FSDP this shards the model and its averages. ``terms`` are the user's; ``begin`` steps are done.
    """

    def __init__(
        self,
        model: Model,
        averages: Mapping[str, EMA],
        train: TrainConfig,
        device: torch.device,
        world: World = ALONE,
        terms: Mapping[str, LossTerm] | None = None,
        begin: int = 0,
    ) -> None:
        self.model, self.averages, self.train, self.device = model, averages, train, device
        losses = partial(losses_of(model), extra=terms) if terms else losses_of(model)
        idle, opaque = begin < train.codec_warmup, bool(terms)
        models = [average.model for average in averages.values()]
        self.losses = SharedLoss(model, models, losses, train, world, device, idle, opaque)
        self.optimizer = build_optimizer(model, train.optimizer)

    def passes(
        self, batches: Iterable[MicroBatch], count: int, rollout: Rollout | None, perceptual: Perceptual | None = None
    ) -> list[dict[str, Tensor]]:
        """Accumulate the gradients of ``count`` micro-batches; without a rollout, of the reconstruction pass alone.

        Return the losses of each micro-batch by name, without gradient.
        """
        measured = []
        for place, (images, labels, keys) in enumerate(batches, start=1):
            with self.losses.accumulating(last=place == count):
                with autocast(self.device, self.train.precision):
                    losses = self.losses(images, labels, keys, self.train.objective, rollout, perceptual)
                torch.autograd.backward(losses.total / count)
            measured.append(losses.measured())
        return measured

    def update(self, step: int) -> Tensor:
        """Update weights and averages at step ``step`` (from 0); return the norm before the gradients were clipped."""
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.optimizer.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.update(self.model, step)
        return norm
