"""A recipe for one's own pictures, chosen for the pictures, the machine and the time.

The speed of each model is measured on this machine. The images that each model needs (:data:`LADDER`), the patches and
the states are rules of thumb from the runs of docs/evidence.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pra.bench.device import timed
from pra.bench.training import SyntheticStep
from pra.config import (
    DataConfig,
    LearningRate,
    ObjectiveConfig,
    OnCorrupt,
    OnSmall,
    OptimizerConfig,
    Parallel,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from pra.data.survey import Survey
from pra.errors import PraError
from pra.models import count_parameters
from pra.recipes.presets import sized
from pra.recipes.tricks import plus
from pra.utils.compiler import can_compile
from pra.utils.device import cores

NAME = "own"

MINUTES, TRAINING_SHARE = 30.0, 0.85
"""Default minutes of a training, and the share for steps; grids, checkpoints and the start take the rest."""

EPOCHS, FEWEST_IMAGES, FEW_PICTURES = 400, 40_000, 500
"""Most epochs, as in the paper; fewest images seen, as in the studies on CPUs; and the number of pictures below which a
line warns that the model overfits."""

HELD_OUT, FEWEST_TO_HOLD_OUT = 0.05, 200
"""Share of the pictures that are held out, and the fewest pictures for which this is done."""

VALIDATIONS, GRIDS = 20, 5
"""Numbers of held-out losses and of sample grids in a training."""

COMPILE_FROM, COMPILED = 300.0, 0.7
"""Shortest training that is compiled, in seconds, as compiling takes a minute; and the time of a compiled step over the
time of an uncompiled step (measured: 0.62 on a CPU core, emoji in 64 patches, scale cpu)."""

T_MIN, GUIDANCE = {1: 0.9, 3: 0.6}, {1: 1.5, 3: 3.0}
"""Strength of the perturbation, and the guidance scale for pictures with classes: by channels, grey or colour.

These were best on Fashion-MNIST and on emoji (docs/evidence-parts.md). On 1008 colour icons the FID is 2.52 with
``t_min`` 0.6, and 3.57 with 0.9 (docs/own-data.md).
"""

TOO_LARGE = "more memory than the device has"

Choice = tuple[RunConfig, list[str]]
"""A configuration, and one line for each reason."""


@dataclass(frozen=True)
class Rung:
    """A model size, and the fewest images that a training should show such a model (``images``)."""

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
"""Model sizes, cheapest first. Sides are clipped to those of the pictures."""

PATCHES = {8: 2, 16: 2, 32: 4, 64: 8, 128: 16, 256: 16}
"""Patch size by side: 64 tokens, as in our studies, except for side 8 (16 tokens) and 256 (256, as in the paper)."""

STATES = {4: 4, 16: 6, 64: 8, 192: 12}
"""State size by the most numbers of a patch. Larger patches have states of 16, as in the paper."""


def named_after(text: str) -> str:
    """Return the last part of a path or address for use in a folder's name; may be empty."""
    name = re.sub(r"[^\w.-]+", "-", text.rstrip("/").rpartition("/")[2])
    return name.encode()[:120].decode(errors="ignore").strip("-.")  # two such names must fit into 255 bytes


def run_folder(data: str) -> Path:
    """Return ``runs/own-photos`` for ``folder:~/photos``."""
    return Path("runs") / f"{NAME}-{named_after(data.rpartition(':')[2]) or 'pictures'}"


def propose(survey: Survey, minutes: float | None, steps: int | None, device: torch.device) -> Choice:
    """Choose a configuration for these pictures, this machine and this time.

    Times the models of :data:`LADDER` from the cheapest up, a second or two each. Takes the largest model that sees
    enough images in the time or in the steps.

    Args:
        survey: of the pictures.
        minutes: that the training may take; :data:`MINUTES` by default.
        steps: of the training, in place of ``minutes``.
        device: to train on.

    Raises:
        PraError: ``minutes`` is not positive and finite.
    """
    budget = seconds_of(minutes) if steps is None else math.inf
    batch, longest = batch_size(device), longest_training(survey)
    taken: tuple[RunConfig, float] | None = None
    stopped = "the largest there is for such pictures"
    for rung in _rungs(survey):
        config = _configure(survey, rung, batch)
        if taken and rung.images > longest:
            stopped = f"a larger one would need more than {survey.images} pictures"
            break
        needs = f"the next larger choice ({_size(config)}) needs"
        if taken and steps is not None and rung.images > steps * batch:
            stopped = f"{needs} {-(-rung.images // batch):,} steps"
            break
        config, seconds = with_workers(config, survey, device)
        config, seconds = with_compiler(config, seconds, budget if steps is None else steps * seconds, device)
        needed = rung.images / batch * seconds
        if taken and needed >= budget:
            too_long = f"{math.ceil(needed / TRAINING_SHARE / 60):,} minutes" if math.isfinite(needed) else TOO_LARGE
            stopped = f"{needs} {too_long}"
            break
        taken = config, seconds
    assert taken, "the ladder has a first rung"
    config, seconds = taken
    asked = f"--minutes than {minutes or MINUTES:g}" if steps is None else f"--steps than {steps:,}"
    config = with_steps(config, steps_in(budget, seconds, longest, batch) if steps is None else steps)
    return config, [f"{_size(config)}: {stopped}", *_reasons(survey, config, seconds, asked, device)]


def _rungs(survey: Survey) -> list[Rung]:
    """Return the rungs of the ladder for these pictures, cheapest first, without those of equal side and width."""
    # Enlarge pictures by at most a half, unless they are smaller than the smallest side.
    largest = max((side for side in PATCHES if side <= 1.5 * survey.short_side.median), default=min(PATCHES))
    rungs: dict[tuple[int, int], Rung] = {}
    for rung in LADDER:
        clipped = replace(rung, side=min(rung.side, largest))
        rungs.setdefault((clipped.side, clipped.width), clipped)
    return list(rungs.values())


def seconds_of(minutes: float | None) -> float:
    """Return the seconds that training steps get in a training of ``minutes``, :data:`MINUTES` by default."""
    minutes = MINUTES if minutes is None else minutes
    if not 0 < minutes < math.inf:
        raise PraError(f"--minutes {minutes:g} must be positive and finite", option="--minutes", value=f"{minutes:g}")
    return minutes * 60 * TRAINING_SHARE


def longest_training(survey: Survey) -> int:
    """Return the most images that a training sees, repeats included."""
    return max(EPOCHS * survey.images, FEWEST_IMAGES)


def steps_in(budget: float, seconds: float, longest: int, batch: int) -> int:
    """Return the number of steps of ``seconds`` each that fit into ``budget`` seconds; at most ``longest`` images."""
    return max(1, min(int(budget / seconds), -(-longest // batch)))


def batch_size(device: torch.device) -> int:
    """Return the batch size for a device."""
    return 128 if device.type == "cuda" else 32


def peak_rate(width: int) -> float:
    """Return the learning rate of a width: 2e-3 at 64 as in the studies, 1e-3 at 128 as in the recipes."""
    return 0.128 / width


def seconds_per_step(config: RunConfig, device: torch.device, patience: float = 1.0) -> float:
    """Return the mean seconds of a training step on random images, without LPIPS and the compiler.

    Measures for ``patience`` seconds, at least 2 steps, after a step that warms up. Infinite if memory is too small.
    """
    try:
        step = SyntheticStep(replace(config, train=replace(config.train, compile=False)), device)
        timed(step, device)
        seconds: list[float] = []
        while len(seconds) < 2 or sum(seconds) < patience:
            seconds.append(timed(step, device))
        return sum(seconds) / len(seconds)
    except torch.OutOfMemoryError:
        return math.inf


def _configure(survey: Survey, rung: Rung, batch: int) -> RunConfig:
    """Return the configuration of a rung; :func:`with_steps` sets the length."""
    patch, width = PATCHES[rung.side], rung.width
    numbers = patch * patch * survey.channels
    small = width <= 64
    heads = 2 if small else width // 32
    run = RunConfig(
        recipe=NAME,
        model=sized(
            rung.side,
            survey.channels,
            patch,
            len(survey.classes),
            backbone=(rung.depth, width, heads),
            head=(2 if small else 3, width),
            state_dim=next((size for most, size in STATES.items() if numbers <= most), 16),
            encoder=(1 if small else 2, width),
            decoder=(rung.depth // 2, width, heads),
        ),
        data=data_config(survey),
        train=TrainConfig(
            steps=1,
            batch_size=batch,
            rollout=Parallel(t_min=T_MIN[survey.channels]),
            objective=ObjectiveConfig(noise_draws=2 if small else 4),
            optimizer=OptimizerConfig(lr=peak_rate(width), schedule=LearningRate.COSINE),
        ),
        sampling=SamplingConfig(guidance=1.0 if survey.unconditional else GUIDANCE[survey.channels], steps=5),
    )
    return plus(run)


def data_config(survey: Survey) -> DataConfig:
    """Return the data settings for one's own pictures; a share is held out if there are enough of them."""
    enough = survey.images >= FEWEST_TO_HOLD_OUT and not survey.streamed
    held_out = HELD_OUT if enough else None
    return DataConfig(source=survey.source, on_small=OnSmall.UPSCALE, on_corrupt=OnCorrupt.SKIP, validation=held_out)


def with_workers(config: RunConfig, survey: Survey, device: torch.device) -> tuple[RunConfig, float]:
    """Add worker processes if reading would slow training down. Also return the seconds of a step, with reading."""
    arithmetic, reading = seconds_per_step(config, device), survey.seconds_per_image * config.train.batch_size
    workers = min(8, cores()) if reading > 0.2 * arithmetic else 0
    config = replace(config, data=replace(config.data, workers=workers))
    return config, arithmetic + reading / max(1, workers)


def with_compiler(config: RunConfig, seconds: float, training: float, device: torch.device) -> tuple[RunConfig, float]:
    """Turn on compiling if a training of ``training`` seconds is long enough. Also return the seconds of a step."""
    if training < COMPILE_FROM or not can_compile(device):
        return config, seconds
    return replace(config, train=replace(config.train, compile=True)), COMPILED * seconds


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """Set the length, and with it the warm-up, the moving average and the intervals of samples, saves and losses."""
    optimizer = replace(
        config.train.optimizer,
        warmup_steps=min(200, max(1, steps // 20)),
        # Average the last eighth of the run, where the cosine has lowered the rate.
        ema_decay=1.0 - 8.0 / max(16, steps),
    )
    every = -(-steps // GRIDS)
    train = replace(
        config.train,
        steps=steps,
        optimizer=optimizer,
        sample_every=every,
        checkpoint_every=min(500, every),
        validate_every=0 if config.data.validation is None else -(-steps // VALIDATIONS),
    )
    return replace(config, train=train)


def _size(config: RunConfig) -> str:
    height, width = config.model.image_size
    parameters = sum(count_parameters(config.model).values())
    return f"images of {height} x {width}, a model of {parameters / 1e6:.1f} M parameters"


def _reasons(survey: Survey, config: RunConfig, seconds: float, asked: str, device: torch.device) -> list[str]:
    model, train = config.model, config.train
    patch, seen = model.patch_size, train.steps * train.batch_size
    colour = "grey" if model.channels == 1 else "colour"
    classes = "no class folders, so no classes" if survey.unconditional else f"{model.num_classes} classes"
    reading = survey.seconds_per_image * train.batch_size / max(1, config.data.workers) / seconds
    reasons = [
        f"yours are {fitted(survey, config)}",
        f"{colour}; {classes}",
        f"{model.num_patches} patches of {patch} x {patch}, each a state of {model.state_dim} numbers",
        pace(config, survey, seconds, device),
    ]
    if reading > 0.3:
        reasons.append(f"{reading:.0%} of that is reading: smaller copies would train faster")
    if config.data.validation is not None:
        held_out = round(HELD_OUT * survey.images)
        reasons.append(f"{held_out} pictures are held out: their loss tells whether training overfits")
    if survey.images < FEW_PICTURES:
        reasons.append(f"{survey.images} pictures are few: expect the model to overfit")
    if seen < FEWEST_IMAGES:
        reasons.append(f"{seen:,} images seen are few: expect blurs; more {asked} help")
    return reasons


def fitted(survey: Survey, config: RunConfig) -> str:
    """Return the part of a line that tells how pictures are fitted to the model's size."""
    height, width = config.model.image_size
    scaled = "enlarged" if survey.short_side.median < min(height, width) else "scaled"
    cut = "" if survey.square == survey.opened and height == width else " and cut to the middle"
    return f"{survey.short_side} pixels on the short side: they are {scaled}{cut}"


def pace(config: RunConfig, survey: Survey, seconds: float, device: torch.device) -> str:
    """Return a line with the time of a step and of the whole training."""
    train = config.train
    learnt = survey.images * (1.0 - (config.data.held_out_share or 0.0))
    measured, compiled = seconds, ""
    if train.compile:
        measured, compiled = seconds / COMPILED, f", about {seconds:.3g} s once compiled"
    return (
        f"a step of {train.batch_size} images takes {measured:.3g} s on {device}, measured just now{compiled}: "
        f"{train.steps:,} steps, {train.steps * train.batch_size / learnt:.3g} epochs, "
        f"{train.steps * seconds / TRAINING_SHARE / 60:.2g} minutes"
    )
