"""Fine-tuning: train a model on other pictures, of the same or of other classes.

All weights start from the old model; classes are matched by name (:mod:`pra.training.initial`). The objective stays,
and backbone, head and codec train together. The learning rate is lower. The moving average is shorter: after a short
run, a long one would still hold the old weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pra.config import Clean, LearningRate, ObjectiveConfig, OptimizerConfig, Parallel, RunConfig, TrainConfig
from pra.data.survey import Survey
from pra.errors import PraError
from pra.models import Model
from pra.recipes import own

NAME = "fine-tuned"

LOWER, EPOCHS, FEWEST_STEPS = 10, 40, 50
"""Divisor of the old learning rate, most epochs, and fewest steps.

From docs/own-data.md: a model of a thousand icons was trained on 85 others. With more epochs or a higher rate it got
worse on 85 held-out icons.
"""

NAMED = 8
"""Most classes that a line lists by name."""


def run_folder(start: str, data: str) -> Path:
    """Return ``runs/own-photos-from-flowers`` for ``runs/flowers`` and ``folder:~/photos``."""
    return own.run_folder(data).with_name(f"{own.run_folder(data).name}-from-{own.named_after(start) or 'run'}")


def propose(
    start: str,
    model: Model,
    run: RunConfig | None,
    survey: Survey,
    minutes: float | None,
    steps: int | None,
    device: torch.device,
) -> own.Choice:
    """Choose a configuration that fine-tunes the model in ``start`` on these pictures.

    Args:
        start: path or address of the model.
        model: the model; its weights are not read.
        run: the configuration that trained it, if known. Its settings are kept.
        survey: of the pictures.
        minutes: that the training may take; :data:`own.MINUTES` by default.
        steps: of the training, in place of ``minutes``.
        device: to train on.

    Raises:
        PraError: the time is not positive, a step needs more memory than the device has, or several classes share a
            name.
    """
    model.condition.rows_for(model.classes, tuple(survey.classes))  # refuse ambiguous names of classes
    train = _training(run, model, device)
    optimizer = replace(train.optimizer.slower(LOWER), schedule=LearningRate.COSINE)
    reads = model.config.text is not None
    unguided = model.config.num_classes == 1 and not reads
    guidance = own.GUIDANCE[survey.channels] if unguided else model.sampling.guidance
    config = RunConfig(
        recipe=NAME,
        model=replace(model.config, num_classes=len(survey.classes)),
        data=own.data_config(survey),
        # The codec is trained already; validate_every follows from the length.
        train=replace(train, optimizer=optimizer, codec_warmup=0, validate_every=0),
        sampling=replace(model.sampling, guidance=1.0 if survey.unconditional and not reads else guidance),
        initial=start,
    )
    if steps is None:
        config, length = _filled(config, survey, minutes, device)
    else:
        config, length = own.with_steps(config, steps), f"{steps} steps, as asked for"
    rate = f"the rate of {start}" if run else "the usual one for this width"
    optimizer, channels = config.train.optimizer, model.config.channels
    height, width = model.config.image_size
    fitted = own.fitted(survey, config)
    if channels != survey.channels:
        fitted += f", and converted to {'grey' if channels == 1 else 'colour'} for the model"
    return config, [
        f"images of {height} x {width}, the model's size: yours are {fitted}",
        _inherited(model.classes, tuple(survey.classes)),
        f"a learning rate of {optimizer.lr:.3g}, {rate} divided by {LOWER}, with a warm-up of {optimizer.warmup_steps}",
        f"samples from an average over the last eighth of the run (EMA {optimizer.ema_decay:.4g}): a longer one would "
        "still hold the old weights",
        length,
    ]


def _training(run: RunConfig | None, model: Model, device: torch.device) -> TrainConfig:
    """Return the settings of the run; without a run, those of a training on one's own pictures."""
    if run is None:
        return TrainConfig(
            steps=1,
            batch_size=own.batch_size(device),
            rollout=Clean() if model.config.codec is None else Parallel(t_min=0.9),
            optimizer=OptimizerConfig(lr=own.peak_rate(model.config.width)),
        )
    train, usual = run.train, ObjectiveConfig()
    if train.trainable != ("shortcut",):
        return train
    return replace(  # undo the settings of distillation, which trained the second head only
        train,
        trainable=("all",),
        objective=replace(train.objective, noise_draws=usual.noise_draws, shortcut_draws=usual.shortcut_draws),
        optimizer=replace(train.optimizer, weight_decay=OptimizerConfig().weight_decay),
    )


def _filled(config: RunConfig, survey: Survey, minutes: float | None, device: torch.device) -> tuple[RunConfig, str]:
    """Return the configuration with the steps that the time allows, and a sentence about it."""
    budget, batch = own.seconds_of(minutes), config.train.batch_size
    config, seconds = own.with_workers(config, survey, device)
    if math.isinf(seconds):
        micro, _ = config.train.micro_batches(1)
        problem = (
            f"a step of {micro} images of the model of {config.initial} needs {own.TOO_LARGE} ({device}). Use "
            f"--steps N and --set train.micro_batch_size={max(1, micro // 4)}"
        )
        raise PraError(problem, code="too-large", value=micro)
    config, seconds = own.with_compiler(config, seconds, budget, device)
    longest = longest_training(survey, batch)
    steps = own.steps_in(budget, seconds, longest, batch)
    config = own.with_steps(config, steps)
    enough = ": more would overfit the pictures" if steps * batch >= longest else ""
    return config, own.pace(config, survey, seconds, device) + enough


def longest_training(survey: Survey, batch: int) -> int:
    """Return the most images that a training sees, repeats included; ``batch`` images make a step."""
    return max(EPOCHS * survey.images, FEWEST_STEPS * batch)


def _inherited(old: Sequence[str], new: Sequence[str]) -> str:
    """Return a line about kept, new and removed classes; each list is cut after :data:`NAMED` names."""
    parts = {
        "kept": [name for name in new if name in old],
        "new, started from the null class": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
    }
    lists = {what: ", ".join(names[:NAMED]) for what, names in parts.items() if names}
    more = {what: f" and {len(names) - NAMED} more" for what, names in parts.items() if len(names) > NAMED}
    return "classes " + "; ".join(f"{what}: {text}{more.get(what, '')}" for what, text in lists.items())
