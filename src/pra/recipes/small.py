"""Runs that a laptop finishes."""

from __future__ import annotations

from pra.config import (
    CodecConfig,
    DataConfig,
    EncoderConfig,
    Fit,
    HeadConfig,
    LearningRate,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Parallel,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    TransformerConfig,
)


def tiny() -> RunConfig:
    """A model for tests: every part there, nothing learnt in its 20 steps."""
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            image_size=(8, 8),
            channels=1,
            patch_size=2,
            num_classes=10,
            class_tokens=2,
            backbone=TransformerConfig(depth=2, width=32, heads=2),
            head=HeadConfig(depth=2, width=32),
            codec=CodecConfig(
                state_dim=4,
                encoder=EncoderConfig(depth=1, width=32),
                decoder=TransformerConfig(depth=1, width=32, heads=2),
            ),
        ),
        data=DataConfig(source="digits"),
        train=TrainConfig(
            steps=20,
            batch_size=8,
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=5),
            log_every=5,
            sample_every=10,
            checkpoint_every=10,
        ),
        sampling=SamplingConfig(guidance=1.5, steps=2),
    )


def digits() -> RunConfig:
    """scikit-learn's 8x8 digits in under three minutes on two CPU cores."""
    return RunConfig(
        recipe="digits",
        model=ModelConfig(
            image_size=(8, 8),
            channels=1,
            patch_size=2,
            num_classes=10,
            class_tokens=2,
            backbone=TransformerConfig(depth=4, width=64, heads=4),
            head=HeadConfig(depth=2, width=64, modulations=1),
            codec=CodecConfig(
                state_dim=4,
                encoder=EncoderConfig(depth=1, width=64, sees_condition=False),
                decoder=TransformerConfig(depth=2, width=64, heads=4),
            ),
        ),
        data=DataConfig(source="digits"),
        train=TrainConfig(
            steps=1200,
            batch_size=64,
            optimizer=OptimizerConfig(lr=2e-3, warmup_steps=100, schedule=LearningRate.COSINE, ema_decay=0.999),
            log_every=25,
        ),
        sampling=SamplingConfig(guidance=1.5),
    )


def fashion() -> RunConfig:
    """Fashion-MNIST, padded to 32x32: 16 patches of 8x8, each a state of 8 numbers."""
    return RunConfig(
        recipe="fashion",
        model=ModelConfig(
            image_size=(32, 32),
            channels=1,
            patch_size=8,
            num_classes=10,
            class_tokens=4,
            backbone=TransformerConfig(depth=6, width=128, heads=4),
            head=HeadConfig(depth=3, width=160, modulations=1),
            codec=CodecConfig(
                state_dim=8,
                encoder=EncoderConfig(depth=2, width=128, sees_condition=False),
                decoder=TransformerConfig(depth=3, width=128, heads=4),
            ),
        ),
        data=DataConfig(source="idx:/usr/share/datasets/fashion-mnist", fit=Fit.PAD),
        train=TrainConfig(
            steps=5_000,
            batch_size=128,
            rollout=Parallel(t_min=0.95),
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=200, schedule=LearningRate.COSINE, ema_decay=0.999),
            sample_every=1000,
        ),
        sampling=SamplingConfig(guidance=1.5),
    )


def fashion_64() -> RunConfig:
    """Fashion-MNIST in 64 patches of 4x4: the model that comes with the package.

    Inputs are perturbed as little as the study `noise` found best at this length (docs/evidence.md).
    """
    return RunConfig(
        recipe="fashion-64",
        model=ModelConfig(
            image_size=(32, 32),
            channels=1,
            patch_size=4,
            num_classes=10,
            class_tokens=4,
            backbone=TransformerConfig(depth=5, width=96, heads=4),
            head=HeadConfig(depth=3, width=128, modulations=1),
            codec=CodecConfig(
                state_dim=6,
                encoder=EncoderConfig(depth=2, width=96, sees_condition=False),
                decoder=TransformerConfig(depth=2, width=96, heads=4),
            ),
        ),
        data=DataConfig(source="idx:/usr/share/datasets/fashion-mnist", fit=Fit.PAD),
        train=TrainConfig(
            steps=8_000,
            batch_size=64,
            rollout=Parallel(t_min=0.9),
            objective=ObjectiveConfig(noise_draws=2),
            optimizer=OptimizerConfig(lr=1.5e-3, warmup_steps=300, schedule=LearningRate.COSINE, ema_decay=0.999),
            sample_every=1000,
        ),
        sampling=SamplingConfig(guidance=1.5),
    )


def emoji() -> RunConfig:
    """The Noto colour emoji at 64x64: 16 patches of 16x16, 768 numbers each and states of 16, as in the paper.

    Perturbation and guidance as the study `noise` found them at this patch size (docs/evidence.md).
    """
    return RunConfig(
        recipe="emoji",
        model=ModelConfig(
            image_size=(64, 64),
            channels=3,
            patch_size=16,
            num_classes=9,
            class_tokens=4,
            backbone=TransformerConfig(depth=6, width=128, heads=4),
            head=HeadConfig(depth=3, width=160, modulations=1),
            codec=CodecConfig(
                state_dim=16,
                encoder=EncoderConfig(depth=2, width=128, sees_condition=False),
                decoder=TransformerConfig(depth=3, width=128, heads=4),
            ),
        ),
        data=DataConfig(source="emoji"),
        train=TrainConfig(
            steps=5_000,
            batch_size=64,
            rollout=Parallel(t_min=0.6),
            optimizer=OptimizerConfig(lr=1e-3, warmup_steps=200, schedule=LearningRate.COSINE, ema_decay=0.999),
            sample_every=1000,
        ),
        sampling=SamplingConfig(guidance=3.0),
    )
