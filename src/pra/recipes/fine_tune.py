"""Fine-tuning: train a model further with other pictures, of the same or of other classes.

The model keeps all but its classes (:mod:`pra.training.initial`), and its objective: backbone, head and codec train
together. The rate is lower, and the average shorter, which would otherwise show the old model after a short run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pra.config import (
    AnyModelConfig,
    Clean,
    LearningRate,
    ObjectiveConfig,
    OptimizerConfig,
    Parallel,
    RunConfig,
    TrainConfig,
    apply_settings,
)
from pra.data.survey import Survey, look
from pra.errors import PraError
from pra.models import Model, weights
from pra.recipes import own
from pra.training.initial import check_same_model
from pra.training.run import read_run

NAME = "fine-tuned"

LOWER, EPOCHS, FEWEST_STEPS = 10, 40, 50
"""Divisor of the other run's learning rate, and the longest training. Both are from docs/own-data.md: a model of a
thousand icons, trained on 85 others longer or faster, got worse on 85 that it did not see."""

NAMED = 8
"""Classes that a line names."""


def run_folder(start: str, data: str) -> Path:
    """Return ``runs/own-photos-from-flowers`` for ``runs/flowers`` and ``folder:~/photos``."""
    name = re.sub(r"[^\w.-]+", "-", start.rstrip("/").rpartition("/")[2]).strip("-.")
    return own.run_folder(data).with_name(f"{own.run_folder(data).name}-from-{name or 'run'}")


def configure(
    start: str, data: str | None, folder: Path, minutes: float | None, steps: int | None, device: torch.device
) -> tuple[RunConfig, list[str]]:
    """Return the configuration of the run in ``folder``, or choose one (:func:`propose`); and lines that say why.

    Raises:
        PraError: as :func:`pra.load`, :func:`pra.data.survey.look` and :func:`propose`; or there is neither a
            run nor ``data``.
    """
    if (folder / weights.CONFIG).exists():
        begun = read_run(folder)
        if begun.initial is None or Path(begun.initial) != Path(start):  # runs/a/ is runs/a
            # Another start makes another run: training refuses it, and names both.
            begun = replace(begun, initial=start)
        return begun, [f"settings: those of {folder}, chosen when it began"]
    if data is None:
        problem = f"no run at {folder} to go on with. Name the pictures for {start} with --data folder:PHOTOS"
        raise PraError(problem, code="missing", path=folder)
    base = weights.model_folder(start)
    model, run = weights.read_config(base), weights.run_of(base)
    survey = look(data)
    config, reasons = propose(start, model, read_run(run) if run else None, survey, minutes, steps, device)
    return config, own.told(survey, f"from {start}:", reasons)


@dataclass(frozen=True)
class _Adjustable:
    """The part of a configuration that ``model.*`` settings change."""

    model: AnyModelConfig


def check_settings(start: str, settings: Sequence[str]) -> None:
    """Refuse settings (``"model.image_size=64"``) under which a model cannot begin with the weights of ``start``."""
    model = weights.read_config(weights.model_folder(start)).config
    asked = apply_settings(_Adjustable(model), [line for line in settings if line.startswith(("model.", "model="))])
    check_same_model(start, model, asked.model)


def propose(
    start: str,
    model: Model,
    run: RunConfig | None,
    survey: Survey,
    minutes: float | None,
    steps: int | None,
    device: torch.device,
) -> tuple[RunConfig, list[str]]:
    """Choose a configuration that trains the model in ``start`` further with these pictures (:func:`own.propose`).

    The weights of ``model`` do not matter. The settings of ``run``, which trained it, are kept, if it is known.

    Raises:
        PraError: no time, or a step needs more memory than the device has.
    """
    train = _of_everything(run.train) if run else _training(model, device)
    optimizer = replace(train.optimizer.slower(LOWER), schedule=LearningRate.COSINE)
    config = RunConfig(
        recipe=NAME,
        model=replace(model.config, num_classes=len(survey.classes)),
        data=own.data_config(survey),
        # The codec is trained already; validate_every follows from the length.
        train=replace(train, optimizer=optimizer, codec_warmup=0, validate_every=0),
        sampling=replace(model.sampling, guidance=_guidance(model, survey)),
        initial=start,
    )
    if steps is None:
        config, length = _filled(config, survey, own.MINUTES if minutes is None else minutes, device)
    else:
        config, length = own.with_steps(config, steps), f"{steps} steps, as asked for"
    rate = f"the rate of {start}" if run else "the usual one for this width"
    optimizer = config.train.optimizer
    return config, [
        _fitted(model, survey),
        _inherited(model.classes, tuple(survey.classes)),
        f"a learning rate of {optimizer.lr:.3g}, {rate} divided by {LOWER}, with a warm-up of {optimizer.warmup_steps}",
        f"samples from an average over the last eighth of the run (EMA {optimizer.ema_decay:.4g}): a longer one would "
        "still show the old model",
        length,
    ]


def _of_everything(train: TrainConfig) -> TrainConfig:
    """The run's settings; for a distilled run, whose settings are for its second head alone, the usual ones."""
    if train.trainable != ("shortcut",):
        return train
    usual = ObjectiveConfig()
    return replace(
        train,
        trainable=("all",),
        objective=replace(train.objective, noise_draws=usual.noise_draws, shortcut_draws=usual.shortcut_draws),
        optimizer=replace(train.optimizer, weight_decay=OptimizerConfig().weight_decay),
    )


def _training(model: Model, device: torch.device) -> TrainConfig:
    """Settings of one's own pictures, for a model without its run."""
    return TrainConfig(
        steps=1,
        batch_size=own.batch_size(device),
        rollout=Clean() if model.config.codec is None else Parallel(t_min=0.9),
        optimizer=OptimizerConfig(lr=own.peak_rate(model.config.width)),
    )


def _filled(config: RunConfig, survey: Survey, minutes: float, device: torch.device) -> tuple[RunConfig, str]:
    """With the steps that the time allows, and the words on it."""
    budget, batch = own.seconds_of(minutes), config.train.batch_size
    config, seconds = own.with_workers(config, survey, device, own.seconds_per_step)
    if math.isinf(seconds):
        micro, _ = config.train.micro_batches(1)
        problem = (
            f"a step of {micro} images of the model of {config.initial} needs {own.TOO_LARGE} ({device}). Use "
            f"--steps N and --set train.micro_batch_size={max(1, micro // 4)}"
        )
        raise PraError(problem, code="too-large", value=micro)
    longest = max(EPOCHS * survey.images, FEWEST_STEPS * batch)
    steps = own.steps_in(budget, seconds, longest, batch)
    config = own.with_steps(config, steps)
    enough = ": more would learn the pictures by heart" if steps * batch >= longest else ""
    return config, own.pace(config, survey, seconds, device) + enough


def _guidance(model: Model, survey: Survey) -> float:
    """The model's; 1 without classes, and the usual where the model had none."""
    if survey.unconditional:
        return 1.0
    return own.GUIDANCE if model.config.num_classes == 1 else model.sampling.guidance


def _fitted(model: Model, survey: Survey) -> str:
    """What is done to the pictures."""
    (height, width), channels = model.config.image_size, model.config.channels
    scaled = "enlarged" if survey.short_side.median < min(height, width) else "scaled"
    cut = "" if survey.square == survey.opened and height == width else " and cut to the middle"
    colour = ""
    if channels == 1 and survey.channels > 1:
        colour = "; they turn grey, as the model's images are"
    elif channels > 1 and survey.channels == 1:
        colour = "; they are grey, and the model's images have colour"
    return (
        f"images of {height} x {width} as the model has learnt them: yours, {survey.short_side} pixels on the short "
        f"side, are {scaled}{cut}{colour}"
    )


def _inherited(old: Sequence[str], new: Sequence[str]) -> str:
    """What becomes of the classes."""
    kept, fresh = [name for name in new if name in old], [name for name in new if name not in old]
    gone = [name for name in old if name not in new]
    parts = [
        f"kept: {_names(kept)}" if kept else "",
        f"new, from the model's picture of no class in particular: {_names(fresh)}" if fresh else "",
        f"given up: {_names(gone)}" if gone else "",
    ]
    return "classes " + "; ".join(part for part in parts if part)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
