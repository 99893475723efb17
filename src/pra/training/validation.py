"""The held-out loss: every term of the loss on images that the run does not learn from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pra.data import Source, load_images
from pra.data.source import Streamed
from pra.method import noise
from pra.method.objectives import losses_of
from pra.models import Model
from pra.training.callbacks import Callback
from pra.training.run import VALIDATION, points_of, read_metrics
from pra.utils.device import autocast
from pra.utils.pixels import from_uint8

if TYPE_CHECKING:
    from pra.training.loop import Trainer

MOST = 1024
"""Held-out images that are measured; of more, so many are taken evenly."""
SEED = 0
"""The seed of the noise, whatever the run's: curves of several runs compare."""
PATIENCE, RISE = 3, 1.02
"""Overfitting: so many validations in a row, each above the lowest one before them by this factor."""


class Validation(Callback):
    """Measures the loss of the average ``ema`` on held-out images, with the same noise every time.

    Rank 0 measures for all, which is right under FSDP as well. The values stand in the line of metrics of their step as
    ``validation_flow``, ``validation_pixel``, ...; class dropout and rollouts are those of training, so that they
    compare with the training loss.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.values: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.told = False
        self._loaded: tuple[Tensor, Tensor] | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.rows = [row for row in read_metrics(trainer.folder) if row["step"] <= trainer.step]

    def on_step(self, trainer: Trainer) -> None:
        if not trainer.config.train.validates(trainer.step):
            return
        with trainer.paused():
            parts = trainer.ema.parts(here=trainer.world.is_first)
            found = self._measured(trainer, trainer.ema.assembled(parts)) if trainer.world.is_first else {}
            self.values = trainer.world.combine(found, lambda all_found: all_found[0])

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        row |= self.values
        self.rows.append(dict(row))
        if self.values and not self.told and trainer.world.is_first and overfits(self.rows):
            self.told = True
            step, lowest = _lowest(points_of(self.rows, VALIDATION + "flow"))
            warnings.warn(
                f"training overfits: {VALIDATION}flow was lowest at step {step:.0f} ({lowest:.4g}) and has risen "
                "since, while flow falls. Stop here, or train on more images",
                stacklevel=2,
            )
        self.values = {}

    @torch.no_grad()
    def _measured(self, trainer: Trainer, model: Model) -> dict[str, float]:
        """Means over the held-out images, by name."""
        train = trainer.config.train
        size, _ = train.micro_batches(trainer.world.size)  # fits the memory with gradients, so without them too
        if self._loaded is None:
            count, config = min(MOST, len(self.source)), trainer.config.model
            total = count if isinstance(self.source, Streamed) else len(self.source)  # a stream's first images
            chosen = [place * total // count for place in range(count)]
            self._loaded = load_images(self.source, chosen, config.image_size, config.channels, trainer.config.data)
        pixels, labels = self._loaded
        sums: dict[str, Tensor] = {}
        for part in torch.split(torch.arange(len(labels)), size):
            with autocast(trainer.device, train.precision):
                losses = losses_of(model)(
                    model,
                    from_uint8(pixels[part].to(trainer.device)),
                    labels[part].to(trainer.device),
                    noise.keys(SEED, part.to(trainer.device)),
                    train.objective,
                    train.rollout if trainer.step > train.codec_warmup else None,
                    trainer.perceptual,
                    **({"extra": trainer.terms} if trainer.terms else {}),
                )
            for name, value in losses.terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=trainer.device)) + value.float() * len(part)
        return {VALIDATION + name: value.item() / len(labels) for name, value in sums.items()}


def overfits(rows: Sequence[Mapping[str, float]]) -> bool:
    """Return whether lines of metrics show overfitting.

    That is so where the last :data:`PATIENCE` values of ``validation_flow`` all lie above the lowest value before them
    by the factor :data:`RISE`, and the mean of ``flow`` since the last but one validation is below its mean in the
    interval that ended with that lowest value. The second condition tells overfitting from states that become harder to
    predict, which raise both curves.
    """
    held = points_of(rows, VALIDATION + "flow")
    if len(held) <= PATIENCE:
        return False
    step, lowest = _lowest(held[:-PATIENCE])
    if any(value <= RISE * lowest for _, value in held[-PATIENCE:]):
        return False
    steps = [0.0, *(at for at, _ in held)]
    before = _mean_flow(rows, steps[steps.index(step) - 1], step)
    now = _mean_flow(rows, steps[-2], steps[-1])
    return now < before


def _lowest(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(points, key=lambda point: point[1])


def _mean_flow(rows: Sequence[Mapping[str, float]], after: float, until: float) -> float:
    values = [value for step, value in points_of(rows, "flow") if after < step <= until]
    return sum(values) / len(values)
