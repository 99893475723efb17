"""PRA-S, -B and -L on class-conditional ImageNet 256x256.

Total parameters and targets are the paper's; the division into parts and what else it does not say are ours
(docs/method.md). The optimiser, guidance and noise draws follow SphereAR, by the same authors: 400 epochs, batch
512, AdamW (0.9, 0.95), constant 3e-4 after the warm-up, guidance rising linearly over the raster.

The linear probe's target is top-1 on ImageNet's validation images; the paper's protocol for it is not known to us, ours
is in docs/probe.md (``pra probe RUN --test folder:VAL --layers ...``).
"""

from __future__ import annotations

from typing import Any

from pra.config import (
    DataConfig,
    GuidanceSchedule,
    ObjectiveConfig,
    OnSmall,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    Solver,
    Targets,
    TrainConfig,
)
from pra.recipes.sizes import sized

EPOCHS, BATCH, IMAGES = 400, 512, 1_281_167
STEPS_PER_EPOCH = IMAGES // BATCH


def pra_s_256() -> RunConfig:
    """PRA-S, 135M parameters, FID 2.58."""
    targets = _targets(135e6, 2.58)
    parts = {"backbone": (12, 768, 12), "head": (6, 768), "encoder": (2, 384), "decoder": (7, 384, 6)}
    return _run("pra-s-256", targets, micro_batch=64, **parts)


def pra_b_256() -> RunConfig:
    """PRA-B, 250M parameters, FID 2.21."""
    targets = _targets(250e6, 2.21)
    parts = {"backbone": (24, 768, 12), "head": (6, 768), "encoder": (2, 768), "decoder": (5, 768, 12)}
    return _run("pra-b-256", targets, micro_batch=32, **parts)


def pra_l_256() -> RunConfig:
    """PRA-L, 511M parameters, FID 1.94, linear probe 68.8 %."""
    targets = _targets(511e6, 1.94, linear_probe=0.688)
    parts = {"backbone": (32, 1024, 16), "head": (8, 1024), "encoder": (2, 768), "decoder": (5, 768, 12)}
    return _run("pra-l-256", targets, micro_batch=32, **parts)


def _targets(parameters: float, fid_50k: float, **more: float) -> Targets:
    return Targets(source="arXiv 2606.27978", parameters=parameters, fid_50k=fid_50k, **more)


def _run(name: str, targets: Targets, micro_batch: int, **parts: Any) -> RunConfig:
    source = "imagenet-tar:ILSVRC2012_img_train.tar"
    return RunConfig(
        recipe=name,
        model=sized(256, 3, 16, 1000, state_dim=16, class_tokens=16, modulations=2, sees_condition=True, **parts),
        data=DataConfig(source=source, flip=True, on_small=OnSmall.UPSCALE, workers=12),
        train=TrainConfig(
            steps=EPOCHS * STEPS_PER_EPOCH,
            batch_size=BATCH,
            micro_batch_size=micro_batch,  # 20 to 31 GiB of activations: `pra bench train RECIPE --plan`
            objective=ObjectiveConfig(perceptual_weight=1.0),
            optimizer=OptimizerConfig(warmup_steps=10 * STEPS_PER_EPOCH),
            compile=True,
            log_every=100,
            sample_every=10_000,
            checkpoint_every=STEPS_PER_EPOCH,
        ),
        sampling=SamplingConfig(
            guidance=4.5, schedule=GuidanceSchedule.LINEAR, solver=Solver.EULER_MARUYAMA, steps=100
        ),
        targets=targets,
    )
