"""A recipe for one's own pictures: what fits them, the machine and the time.

What is measured is this machine's speed on the very models in question. Which model is worth which length of training
is a judgement (:data:`LADDER`), as are patches and states, which follow the settings of docs/evidence.md.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pra.config import (
    CodecConfig,
    DataConfig,
    EncoderConfig,
    HeadConfig,
    LearningRate,
    ModelConfig,
    ObjectiveConfig,
    OnCorrupt,
    OnSmall,
    OptimizerConfig,
    Parallel,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    TransformerConfig,
)
from pra.data.survey import Survey, look
from pra.errors import PraError
from pra.method import noise
from pra.method.objectives import training_losses
from pra.models import build_model, count_parameters
from pra.models.weights import CONFIG
from pra.training.optimizer import build_optimizer
from pra.training.run import read_run
from pra.utils.device import autocast, cores

NAME = "own"

MINUTES = 30.0
"""Where nobody says how long."""

TRAINING_SHARE = 0.85
"""Of the time; grids, checkpoints and the start take the rest."""

EPOCHS = 400
"""The paper's length on ImageNet: more often than that no picture is seen, unless there are very few."""

FEWEST_IMAGES = 40_000
"""Seen in training, however few pictures there are: about the length of the studies on CPUs, which is not long."""

FEW_PICTURES = 500
"""Below which a person is to be warned."""

HELD_OUT, FEWEST_TO_HOLD_OUT = 0.05, 200
"""The share of the pictures that the held-out loss is measured on, and from how many pictures on."""

VALIDATIONS = 20
"""Measurements of the held-out loss, over the training."""

GRIDS = 5
"""Of samples, over the training."""

GUIDANCE = 1.5
"""Where there are classes to tell apart."""


@dataclass(frozen=True)
class Rung:
    """A model, and how many images it should at least see for its size to be worth it."""

    side: int
    width: int
    depth: int
    images: int


LADDER = (
    Rung(16, 64, 4, 20_000),
    Rung(32, 64, 4, 40_000),
    Rung(64, 64, 4, 60_000),
    Rung(64, 128, 6, 150_000),
    Rung(64, 256, 8, 500_000),
    Rung(128, 256, 8, 1_000_000),
    Rung(256, 512, 12, 5_000_000),
)
"""From the cheapest up; sides are clipped to the pictures'."""

PATCHES = {8: 2, 16: 2, 32: 4, 64: 8, 128: 16, 256: 16}
"""By side: 64 tokens, where PRA was measured, but for the smallest (16) and the largest (256, the paper's)."""

STATES = {4: 4, 16: 6, 64: 8, 192: 12}
"""Numbers of a state by the numbers of a patch, up to which it serves; beyond them 16, as in the paper."""


def run_folder(data: str) -> Path:
    """``runs/own-photos`` for ``folder:~/photos``."""
    name = re.sub(r"[^\w.-]+", "-", data.rstrip("/").rpartition("/")[2].rpartition(":")[2]).strip("-.")
    return Path("runs") / f"{NAME}-{name or 'pictures'}"


def configure(
    data: str | None, folder: Path, minutes: float | None, steps: int | None, device: torch.device
) -> tuple[RunConfig, list[str]]:
    """The configuration of the run in ``folder``: what was chosen when it began, or else what is chosen now.

    Returns:
        The configuration, and lines for a person: what was found, what was chosen, and why.

    Raises:
        PraError: as :func:`pra.data.survey.look` and :func:`propose`; or there is neither a run nor ``data``.
    """
    if (folder / CONFIG).exists():
        return read_run(folder), [f"settings: those of {folder}, chosen when it began"]
    if data is None:
        raise PraError(
            f"no run at {folder} to go on with; name a RECIPE, or your own pictures with --data folder:PHOTOS"
        )
    survey = look(data)
    config, reasons = propose(survey, minutes, steps, device)
    found = [f"  {line}" for line in survey.lines()]
    chosen = [f"  {line}" for line in reasons]
    return config, [f"found in {survey.source}:", *found, "chosen:", *chosen]


Speed = Callable[[RunConfig, torch.device], float]


def propose(
    survey: Survey, minutes: float | None, steps: int | None, device: torch.device, speed: Speed | None = None
) -> tuple[RunConfig, list[str]]:
    """A configuration for these pictures, this machine and this time.

    Models are tried from the cheapest up, each timed for a second or two; the last that can see enough images in the
    time, or in the steps, is taken.

    Args:
        survey: of the pictures.
        minutes: that the training may take; :data:`MINUTES` by default.
        steps: of the training, in place of ``minutes``.
        device: to train on.
        speed: seconds of one training step; :func:`seconds_per_step` by default.

    Returns:
        The configuration, of the recipe "own", and why it is so, a sentence each.

    Raises:
        PraError: no time.
    """
    minutes = MINUTES if minutes is None else minutes
    budget = seconds_of(minutes) if steps is None else math.inf
    batch, longest = batch_size(device), max(EPOCHS * survey.images, FEWEST_IMAGES)
    taken: tuple[RunConfig, float] | None = None
    stopped = ""
    for rung in _ladder(survey):
        config = _configure(survey, rung, batch)
        if taken and rung.images > longest:
            stopped = f"a larger one would need more than {survey.images} pictures"
            break
        if taken and steps is not None and rung.images > steps * batch:
            stopped = f"the next larger choice ({_size(config)}) needs {-(-rung.images // batch):,} steps"
            break
        config, seconds = timed(config, survey, device, speed or seconds_per_step)
        needed = rung.images / batch * seconds
        if taken and needed >= budget:  # endless, where the memory does not hold it
            stopped = f"the next larger choice ({_size(config)}) needs {_minutes(needed)}"
            break
        taken = config, seconds
    assert taken, "the ladder has a first rung"
    config, seconds = taken
    asked = f"--minutes than {minutes:g}" if steps is None else f"--steps than {steps:,}"
    config = with_steps(config, steps_in(budget, seconds, longest, batch) if steps is None else steps)
    return config, _reasons(survey, config, seconds, asked, stopped, device)


def seconds_of(minutes: float) -> float:
    """Of training steps, in so many minutes of training.

    Raises:
        PraError: no time.
    """
    if not 0 < minutes < math.inf:
        raise PraError(f"--minutes {minutes:g} must be positive and finite")
    return minutes * 60 * TRAINING_SHARE


def steps_in(budget: float, seconds: float, longest: int, batch: int) -> int:
    """Steps of so many seconds in ``budget`` seconds; no more than it takes to see ``longest`` images."""
    return max(1, min(int(budget / seconds), -(-longest // batch)))


def batch_size(device: torch.device) -> int:
    """Images of a step."""
    return 128 if device.type == "cuda" else 32


def peak_rate(width: int) -> float:
    """The learning rate, as in the studies (2e-3 at 64) and the recipes (1e-3 at 128): the wider, the slower."""
    return 0.128 / width


def seconds_per_step(config: RunConfig, device: torch.device, patience: float = 1.0) -> float:
    """Times training steps of a model on random images: one to warm up, then for ``patience`` seconds, 2 at least.

    Returns:
        Seconds of one step; infinite where the device's memory does not hold it.
    """
    try:
        return _time_steps(config, device, patience)
    except torch.OutOfMemoryError:
        return math.inf


def _time_steps(config: RunConfig, device: torch.device, patience: float) -> float:
    model = build_model(config.model).to(device)
    optimizer = build_optimizer(model, config.train.optimizer)
    size = config.train.batch_size
    indices = torch.arange(size, device=device)
    pixels = noise.normal(noise.keys(0, indices), config.model.channels, *config.model.image_size)
    labels = indices % config.model.num_classes

    def step() -> None:
        with autocast(device, config.train.precision):
            losses = training_losses(
                model, pixels, labels, noise.keys(0, indices), config.train.objective, config.train.rollout
            )
        torch.autograd.backward(losses.total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # a number: the device has finished
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    begin, done = time.monotonic(), 0
    while done < 2 or time.monotonic() - begin < patience:
        step()
        done += 1
    return (time.monotonic() - begin) / done


def _ladder(survey: Survey) -> list[Rung]:
    """Rungs for these pictures: none is enlarged by more than half, where the smallest model allows."""
    largest = max((side for side in PATCHES if side <= 1.5 * survey.short_side.median), default=min(PATCHES))
    rungs: dict[tuple[int, int], Rung] = {}
    for rung in LADDER:
        clipped = replace(rung, side=min(rung.side, largest))
        rungs.setdefault((clipped.side, clipped.width), clipped)
    return list(rungs.values())


def _configure(survey: Survey, rung: Rung, batch: int) -> RunConfig:
    """All but the length."""
    patch, channels = PATCHES[rung.side], survey.channels
    numbers = patch * patch * channels
    small = rung.width <= 64
    transformer = TransformerConfig(depth=rung.depth, width=rung.width, heads=2 if small else rung.width // 32)
    return RunConfig(
        recipe=NAME,
        model=ModelConfig(
            image_size=(rung.side, rung.side),
            channels=channels,
            patch_size=patch,
            num_classes=len(survey.classes),
            class_tokens=4,
            backbone=transformer,
            head=HeadConfig(depth=2 if small else 3, width=rung.width, modulations=1),
            codec=CodecConfig(
                state_dim=next((size for most, size in STATES.items() if numbers <= most), 16),
                encoder=EncoderConfig(depth=1 if small else 2, width=rung.width, sees_condition=False),
                decoder=replace(transformer, depth=rung.depth // 2),
            ),
        ),
        data=data_config(survey),
        train=TrainConfig(
            steps=1,
            batch_size=batch,
            rollout=Parallel(t_min=0.9),
            objective=ObjectiveConfig(noise_draws=2 if small else 4),
            optimizer=OptimizerConfig(lr=peak_rate(rung.width), schedule=LearningRate.COSINE),
        ),
        sampling=SamplingConfig(guidance=1.0 if survey.unconditional else GUIDANCE, steps=5),
    )


def data_config(survey: Survey) -> DataConfig:
    """How one's own pictures are read, and the share of them that is held out where there are enough."""
    enough = survey.images >= FEWEST_TO_HOLD_OUT and not survey.streamed
    return DataConfig(
        source=survey.source,
        on_small=OnSmall.UPSCALE,
        on_corrupt=OnCorrupt.SKIP,
        validation=HELD_OUT if enough else None,
    )


def timed(config: RunConfig, survey: Survey, device: torch.device, speed: Speed) -> tuple[RunConfig, float]:
    """With worker processes where reading would hold the model up, and the seconds of a step, reading included."""
    arithmetic, reading = speed(config, device), survey.seconds_per_image * config.train.batch_size
    workers = min(8, cores()) if reading > 0.2 * arithmetic else 0
    config = replace(config, data=replace(config.data, workers=workers))
    return config, arithmetic + reading / max(1, workers)


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """With all that follows from the length: warm-up, moving average, how often to draw, to save and to validate."""
    optimizer = replace(
        config.train.optimizer,
        warmup_steps=min(200, max(1, steps // 20)),
        # An average over the last eighth of the run, by when the cosine has brought the rate down.
        ema_decay=1.0 - 8.0 / max(16, steps),
    )
    every = -(-steps // GRIDS)
    return replace(
        config,
        train=replace(
            config.train,
            steps=steps,
            optimizer=optimizer,
            sample_every=every,
            checkpoint_every=min(500, every),
            validate_every=0 if config.data.validation is None else -(-steps // VALIDATIONS),
        ),
    )


def _minutes(seconds: float) -> str:
    """Of the whole training, by its steps' seconds."""
    if math.isinf(seconds):
        return "more memory than the device has"
    return f"{math.ceil(seconds / TRAINING_SHARE / 60):,} minutes"


def _size(config: RunConfig) -> str:
    height, width = config.model.image_size
    parameters = sum(count_parameters(config.model).values())
    return f"images of {height} x {width}, a model of {parameters / 1e6:.1f} M parameters"


def _reasons(
    survey: Survey, config: RunConfig, seconds: float, asked: str, stopped: str, device: torch.device
) -> list[str]:
    model, train = config.model, config.train
    side, patch, seen = model.image_size[0], model.patch_size, train.steps * train.batch_size
    scaled = "enlarged" if survey.short_side.median < side else "scaled"
    shape = "" if survey.square == survey.opened else " and cut to the middle square"
    reasons = [
        f"{_size(config)}: {stopped or 'the largest there is for such pictures'}",
        f"yours are {survey.short_side} pixels on the short side: they are {scaled}{shape}",
        ("grey: none that was opened has colour; " if model.channels == 1 else "colour; ")
        + ("no class folders, so no classes" if survey.unconditional else f"{model.num_classes} classes"),
        f"{model.num_patches} patches of {patch} x {patch}, each a state of {model.state_dim} numbers",
        pace(config, survey, seconds, device),
    ]
    reading = survey.seconds_per_image * train.batch_size / max(1, config.data.workers)
    if reading > 0.3 * seconds:
        reasons.append(f"{reading / seconds:.0%} of that is reading: copies at {2 * side} pixels would train faster")
    if config.data.validation is not None:
        held = round(HELD_OUT * survey.images)
        reasons.append(f"{held} pictures are held out: their loss tells whether training overfits")
    if survey.images < FEW_PICTURES:
        reasons.append(f"{survey.images} pictures are few: expect the model to learn them by heart")
    if seen < FEWEST_IMAGES:
        reasons.append(f"{seen:,} images seen are few: expect blurs; more {asked} help")
    return reasons


def pace(config: RunConfig, survey: Survey, seconds: float, device: torch.device) -> str:
    """In words: how long a step takes, and what they come to."""
    train = config.train
    learnt = survey.images * (1.0 - (config.data.held_out_share or 0.0))
    return (
        f"a step of {train.batch_size} images takes {seconds:.3g} s on {device}, measured just now: {train.steps:,} "
        f"steps, {train.steps * train.batch_size / learnt:.3g} epochs, "
        f"{train.steps * seconds / TRAINING_SHARE / 60:.2g} minutes"
    )
