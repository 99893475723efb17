"""Runs that a laptop finishes."""

from __future__ import annotations

from typing import Any

from pra.config import (
    DataConfig,
    Fit,
    LearningRate,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Parallel,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from pra.recipes.sizes import sized

FASHION = DataConfig(source="idx:/usr/share/datasets/fashion-mnist", fit=Fit.PAD)


def tiny() -> RunConfig:
    """A model for tests: every part there, nothing learnt in its 20 steps."""
    parts = {"backbone": (2, 32, 2), "head": (2, 32), "encoder": (1, 32), "decoder": (1, 32, 2)}
    model = _of_digits(modulations=2, sees_condition=True, **parts)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=5)
    train = TrainConfig(steps=20, batch_size=8, optimizer=optimizer, log_every=5, sample_every=10, checkpoint_every=10)
    sampling = SamplingConfig(guidance=1.5, steps=2)
    return RunConfig(recipe="tiny", model=model, data=DataConfig(source="digits"), train=train, sampling=sampling)


def digits() -> RunConfig:
    """scikit-learn's 8x8 digits in under three minutes on two CPU cores."""
    model = _of_digits(backbone=(4, 64, 4), head=(2, 64), encoder=(1, 64), decoder=(2, 64, 4))
    return _run("digits", model, DataConfig(source="digits"), (2e-3, 100), steps=1200, batch_size=64, log_every=25)


def fashion() -> RunConfig:
    """Fashion-MNIST, padded to 32x32: 16 patches of 8x8, each a state of 8 numbers."""
    model = sized(32, 1, 8, 10, backbone=(6, 128, 4), head=(3, 160), state_dim=8, encoder=(2, 128), decoder=(3, 128, 4))
    rollout = Parallel(t_min=0.95)
    return _run("fashion", model, FASHION, (1e-3, 200), steps=5_000, batch_size=128, rollout=rollout, sample_every=1000)


def fashion_64() -> RunConfig:
    """Fashion-MNIST in 64 patches of 4x4: the model that comes with the package.

    Inputs are perturbed as little as the study `noise` found best at this length (docs/evidence.md).
    """
    return _run(
        "fashion-64",
        sized(32, 1, 4, 10, backbone=(5, 96, 4), head=(3, 128), state_dim=6, encoder=(2, 96), decoder=(2, 96, 4)),
        FASHION,
        (1.5e-3, 300),
        steps=8_000,
        batch_size=64,
        rollout=Parallel(t_min=0.9),
        objective=ObjectiveConfig(noise_draws=2),
        sample_every=1000,
    )


def emoji() -> RunConfig:
    """The Noto colour emoji at 64x64: 16 patches of 16x16, 768 numbers each and states of 16, as in the paper.

    Perturbation and guidance as the study `noise` found them at this patch size (docs/evidence.md).
    """
    return _run(
        "emoji",
        sized(64, 3, 16, 9, backbone=(6, 128, 4), head=(3, 160), state_dim=16, encoder=(2, 128), decoder=(3, 128, 4)),
        DataConfig(source="emoji"),
        (1e-3, 200),
        guidance=3.0,
        steps=5_000,
        batch_size=64,
        rollout=Parallel(t_min=0.6),
        sample_every=1000,
    )


def _of_digits(**parts: Any) -> ModelConfig:
    return sized(8, 1, 2, 10, state_dim=4, class_tokens=2, **parts)


def _run(
    name: str, model: ModelConfig, data: DataConfig, rate: tuple[float, int], guidance: float = 1.5, **train: Any
) -> RunConfig:
    """A run with a cosine after the warm-up; ``rate`` is its peak, and the steps of the warm-up."""
    optimizer = OptimizerConfig(lr=rate[0], warmup_steps=rate[1], schedule=LearningRate.COSINE, ema_decay=0.999)
    training, sampling = TrainConfig(optimizer=optimizer, **train), SamplingConfig(guidance=guidance)
    return RunConfig(recipe=name, model=model, data=data, train=training, sampling=sampling)
