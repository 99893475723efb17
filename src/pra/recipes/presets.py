"""Recipes: runs that a laptop finishes, with the change ``plus``; and PRA-S, -B and -L on class-conditional ImageNet.

PRA-S, -B and -L have the total parameters and the targets of the paper. The paper does not give the sizes of the parts
and some other settings; these are ours (docs/method.md). Optimiser, guidance and noise draws follow SphereAR, by the
same authors: 400 epochs, batch 512, AdamW (0.9, 0.95), constant 3e-4 after the warm-up, guidance rising linearly over
the raster.

The target of the linear probe is top-1 accuracy on ImageNet's validation images. The paper does not give a protocol;
ours is in docs/probe.md (``pra probe RUN --test folder:VAL --layers ...``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pra.config import (
    CodecConfig,
    DataConfig,
    EncoderConfig,
    Fit,
    GuidanceSchedule,
    HeadConfig,
    LearningRate,
    ModelConfig,
    ObjectiveConfig,
    OnSmall,
    OptimizerConfig,
    Parallel,
    PixelLoss,
    RunConfig,
    SamplingConfig,
    Solver,
    Targets,
    TextConfig,
    TrainConfig,
    TransformerConfig,
)
from pra.recipes.tricks import plus

FASHION = DataConfig(source="idx:/usr/share/datasets/fashion-mnist", fit=Fit.PAD)

EPOCHS, BATCH, IMAGES = 400, 512, 1_281_167
STEPS_PER_EPOCH = IMAGES // BATCH


def sized(
    side: int | tuple[int, int],
    channels: int,
    patch_size: int,
    num_classes: int,
    *,
    backbone: tuple[int, int, int],
    head: tuple[int, int],
    state_dim: int,
    encoder: tuple[int, int],
    decoder: tuple[int, int, int],
    class_tokens: int = 4,
    modulations: int = 1,
    sees_condition: bool = False,
) -> ModelConfig:
    """Return the configuration of a PRA model.

    ``backbone`` and ``decoder`` are (depth, width, heads); ``head`` and ``encoder`` are (depth, width);
    ``sees_condition`` is a setting of the encoder.
    """
    return ModelConfig(
        image_size=(side, side) if isinstance(side, int) else side,
        channels=channels,
        patch_size=patch_size,
        num_classes=num_classes,
        class_tokens=class_tokens,
        backbone=TransformerConfig(depth=backbone[0], width=backbone[1], heads=backbone[2]),
        head=HeadConfig(depth=head[0], width=head[1], modulations=modulations),
        codec=CodecConfig(
            state_dim=state_dim,
            encoder=EncoderConfig(depth=encoder[0], width=encoder[1], sees_condition=sees_condition),
            decoder=TransformerConfig(depth=decoder[0], width=decoder[1], heads=decoder[2]),
        ),
    )


def tiny() -> RunConfig:
    """A model for tests, with every part. Its 20 steps are too few to learn anything."""
    parts: dict[str, Any] = {"backbone": (2, 32, 2), "head": (2, 32), "encoder": (1, 32), "decoder": (1, 32, 2)}
    model = sized(8, 1, 2, 10, state_dim=4, class_tokens=2, modulations=2, sees_condition=True, **parts)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=5)
    train = TrainConfig(steps=20, batch_size=8, optimizer=optimizer, log_every=5, sample_every=10, checkpoint_every=10)
    sampling = SamplingConfig(guidance=1.5, steps=2)
    return RunConfig(recipe="tiny", model=model, data=DataConfig(source="digits"), train=train, sampling=sampling)


def digits() -> RunConfig:
    """scikit-learn's 8x8 digits in three to four minutes on two CPU cores."""
    parts: dict[str, Any] = {"backbone": (4, 64, 4), "head": (2, 64), "encoder": (1, 64), "decoder": (2, 64, 4)}
    model = sized(8, 1, 2, 10, state_dim=4, class_tokens=2, **parts)
    return _run("digits", model, DataConfig(source="digits"), (2e-3, 100), steps=1200, batch_size=64, log_every=25)


def fashion() -> RunConfig:
    """Fashion-MNIST, padded to 32x32: 16 patches of 8x8, each a state of 8 numbers."""
    model = sized(32, 1, 8, 10, backbone=(6, 128, 4), head=(3, 160), state_dim=8, encoder=(2, 128), decoder=(3, 128, 4))
    rollout = Parallel(t_min=0.95)
    return _run("fashion", model, FASHION, (1e-3, 200), steps=5_000, batch_size=128, rollout=rollout, sample_every=1000)


def fashion_64() -> RunConfig:
    """Fashion-MNIST in 64 patches of 4x4: the model that comes with the package.

    The study `noise` found ``t_min`` 0.9 best at this length (docs/evidence.md).
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
    """The Noto colour emoji at 64x64: 16 patches of 16x16, 768 numbers each, and states of 16, as in the paper.

    ``t_min`` and guidance are from the study `noise` at this patch size (docs/evidence.md).
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


def emoji_64() -> RunConfig:
    """The same emoji in 64 patches of 8x8: two hours on one busy CPU core."""
    parts: dict[str, Any] = {"backbone": (6, 160, 5), "head": (3, 160), "encoder": (2, 160), "decoder": (3, 160, 5)}
    return _run(
        "emoji-64",
        sized(64, 3, 8, 9, state_dim=12, **parts),
        DataConfig(source="emoji"),
        (8e-4, 300),
        guidance=3.0,
        steps=6_000,
        batch_size=32,
        rollout=Parallel(t_min=0.6),
        objective=ObjectiveConfig(noise_draws=2),
        sample_every=1000,
    )


def emoji_captions() -> RunConfig:
    """Emoji in three styles from their captions, 64x64: the folder that examples/emoji_captions.py builds."""
    run = emoji_64()
    reader = TransformerConfig(depth=2, width=128, heads=4)
    text = TextConfig(max_length=128, tokens=8, ngrams=8192, transformer=reader)
    folder = "folder:emoji-captions"
    return replace(
        run,
        recipe="emoji-captions",
        model=replace(run.model, num_classes=10, text=text),
        data=DataConfig(source=f"{folder}/train", validation=f"{folder}/heldout-pairs"),
        train=replace(run.train, steps=3_000, sample_every=1000, validate_every=1000),
    )


def _run(
    name: str, model: ModelConfig, data: DataConfig, rate: tuple[float, int], guidance: float = 1.5, **train: Any
) -> RunConfig:
    """Return a run with the change ``plus``; ``rate`` is the peak of a cosine schedule, and its warm-up steps."""
    optimizer = OptimizerConfig(lr=rate[0], warmup_steps=rate[1], schedule=LearningRate.COSINE, ema_decay=0.999)
    compile = name != "digits"  # compiling would take as long as the whole training
    training = TrainConfig(optimizer=optimizer, compile=compile, **train)
    sampling = SamplingConfig(guidance=guidance)
    return plus(RunConfig(recipe=name, model=model, data=data, train=training, sampling=sampling))


def pra_s_256() -> RunConfig:
    """PRA-S, 135M parameters, FID 2.58."""
    parts = {"backbone": (12, 768, 12), "head": (6, 768), "encoder": (4, 384), "decoder": (6, 384, 6)}
    return _imagenet("pra-s-256", 64, 135e6, 2.58, None, **parts)


def pra_b_256() -> RunConfig:
    """PRA-B, 250M parameters, FID 2.21."""
    parts = {"backbone": (24, 768, 12), "head": (6, 768), "encoder": (4, 384), "decoder": (8, 640, 10)}
    return _imagenet("pra-b-256", 32, 250e6, 2.21, None, **parts)


def pra_l_256() -> RunConfig:
    """PRA-L, 511M parameters, FID 1.94, linear probe 68.8 %."""
    parts = {"backbone": (32, 1024, 16), "head": (8, 1024), "encoder": (4, 384), "decoder": (8, 640, 10)}
    return _imagenet("pra-l-256", 32, 511e6, 1.94, 0.688, **parts)


def _imagenet(
    name: str, micro_batch: int, parameters: float, fid: float, linear_probe: float | None, **parts: Any
) -> RunConfig:
    source = "imagenet-tar:ILSVRC2012_img_train.tar"
    return RunConfig(
        recipe=name,
        model=sized(256, 3, 16, 1000, state_dim=16, class_tokens=16, modulations=2, sees_condition=True, **parts),
        data=DataConfig(source=source, flip=True, on_small=OnSmall.UPSCALE, workers=12),
        train=TrainConfig(
            steps=EPOCHS * STEPS_PER_EPOCH,
            batch_size=BATCH,
            micro_batch_size=micro_batch,  # 20 to 31 GiB of activations: `pra bench train RECIPE --plan`
            rollout=Parallel(t_min=0.6),
            objective=ObjectiveConfig(
                pixel_loss=PixelLoss.L1, perceptual_weight=1.0, auxiliary_weight=1.0, encoder_masking=0.5
            ),
            optimizer=OptimizerConfig(warmup_steps=10 * STEPS_PER_EPOCH),
            compile=True,
            log_every=100,
            sample_every=10_000,
            checkpoint_every=STEPS_PER_EPOCH,
        ),
        sampling=SamplingConfig(
            guidance=4.5, schedule=GuidanceSchedule.LINEAR, solver=Solver.EULER_MARUYAMA, steps=100
        ),
        targets=Targets(source="arXiv 2606.27978", parameters=parameters, fid_50k=fid, linear_probe=linear_probe),
    )
