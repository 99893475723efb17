"""A configuration in plain words."""

from __future__ import annotations

from pra.config import (
    AnyModelConfig,
    Clean,
    Exact,
    Fit,
    GuidanceSchedule,
    Noised,
    Parallel,
    Reconstructed,
    Rollout,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from pra.models.weights import power_name

COLOURS = {1: "grey", 3: "colour", 4: "colour with transparency"}
FITS = {
    Fit.CENTER_CROP: "scaled, and cut to the middle",
    Fit.RANDOM_CROP: "scaled and cut at random",
    Fit.PAD: "padded with black",
}


def in_words(config: RunConfig) -> dict[str, str]:
    """The settings that matter most: a name and a sentence each."""
    data, train = config.data, config.train
    words = model_in_words(config.model, config.sampling)
    words["Images"] += f", from {data.source}; {FITS[data.fit]}{', mirrored at random' if data.flip else ''}"
    if config.model.autoregressive:
        words["Inputs in training"] = rollout_in_words(train.rollout)
    return words | {"Training": _training(train)}


def model_in_words(model: AnyModelConfig, sampling: SamplingConfig) -> dict[str, str]:
    """The same of a model whose run is not known."""
    (height, width), (rows, columns), side = model.image_size, model.grid, model.patch_size
    classes = "one class" if model.num_classes == 1 else f"{model.num_classes} classes"
    colours = COLOURS.get(model.channels, f"{model.channels} channels")
    patches = f"{model.num_patches} ({rows} x {columns}) of {side} x {side} pixels, {model.patch_dim} numbers each"
    words = {"Images": f"{height} x {width}, {colours}, {classes}", "Patches": patches, **model.in_words()}
    return words | {"Sampling": _sampling(sampling, model.unit)}


def rollout_in_words(rollout: Rollout) -> str:
    """How the inputs of the autoregressive pass are made."""
    match rollout:
        case Clean():
            return "the true patches (teacher forcing)"
        case Noised():
            return f"the true patches with noise of standard deviation {rollout.sigma:g}"
        case Reconstructed():
            return "decoded from the unperturbed states"
        case Parallel():
            return f"decoded from perturbed states, t between {rollout.t_min:g} and 1 (parallel rollout approximation)"
        case Exact():
            return f"sampled one after the other by the model itself, {rollout.steps} solver steps each"


def _training(train: TrainConfig) -> str:
    rates = train.optimizer
    lengths = "".join(f", {power_name(length)}" for length in train.averages)
    return (
        f"{train.steps:,} steps of {train.batch_size} images; AdamW, learning rate {rates.rates()} "
        f"({rates.schedule.value}, warm-up {rates.warmup_steps:,} steps); moving average {rates.ema_decay:.5g}"
        f"{lengths}; seed {train.seed}"
    )


def _sampling(how: SamplingConfig, unit: str) -> str:
    rising = ", rising linearly along the raster" if how.schedule is GuidanceSchedule.LINEAR else ""
    guidance = "no guidance" if how.guidance == 1 else f"guidance {how.guidance:g}{rising}"
    warmth = "" if how.temperature == 1 else f", temperature {how.temperature:g}"
    return f"{how.solver.value}, {how.steps} intervals per {unit}; {guidance}{warmth}"
