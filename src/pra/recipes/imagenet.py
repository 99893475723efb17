"""PRA-S, -B and -L on class-conditional ImageNet 256x256.

Total parameters and targets are the paper's; the division into parts and what else it does not say are ours
(docs/method.md). The optimiser, guidance and noise draws follow SphereAR, by the same authors: 400 epochs, batch
512, AdamW (0.9, 0.95), constant 3e-4 after the warm-up, guidance rising linearly over the raster.

The linear probe's target is top-1 on ImageNet's validation images; the paper's protocol for it is not known to us, ours
is in docs/probe.md (``pra probe RUN --test folder:VAL --layers ...``).
"""

from __future__ import annotations

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
    targets = Targets(source="arXiv 2606.27978", parameters=135e6, fid_50k=2.58)
    return _run("pra-s-256", (12, 768, 12), 6, (2, 384), (7, 384, 6), 64, targets)


def pra_b_256() -> RunConfig:
    """PRA-B, 250M parameters, FID 2.21."""
    targets = Targets(source="arXiv 2606.27978", parameters=250e6, fid_50k=2.21)
    return _run("pra-b-256", (24, 768, 12), 6, (2, 768), (5, 768, 12), 32, targets)


def pra_l_256() -> RunConfig:
    """PRA-L, 511M parameters, FID 1.94, linear probe 68.8 %."""
    targets = Targets(source="arXiv 2606.27978", parameters=511e6, fid_50k=1.94, linear_probe=0.688)
    return _run("pra-l-256", (32, 1024, 16), 8, (2, 768), (5, 768, 12), 32, targets)


def _run(
    name: str,
    backbone: tuple[int, int, int],
    head_depth: int,
    encoder: tuple[int, int],
    decoder: tuple[int, int, int],
    micro_batch: int,
    targets: Targets,
) -> RunConfig:
    return RunConfig(
        recipe=name,
        model=sized(
            256,
            3,
            16,
            1000,
            backbone=backbone,
            head=(head_depth, backbone[1]),
            state_dim=16,
            encoder=encoder,
            decoder=decoder,
            class_tokens=16,
            modulations=2,
            sees_condition=True,
        ),
        data=DataConfig(
            source="imagenet-tar:ILSVRC2012_img_train.tar", flip=True, on_small=OnSmall.UPSCALE, workers=12
        ),
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
