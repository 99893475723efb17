"""Settings of the studies: data sets cut into tokens, and the scale of a run on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from pra.errors import PraError, nearest


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set at one image and patch size. ``batch_size`` and ``length``, which multiplies a scale's steps, make a
    run cost about the same in every setting, except in a setting that ``lengthens`` another. ``t_min`` and
    ``input_noise`` are the best strengths that the study `noise` has found in this setting, or in the most similar one,
    for PRA and for the systems of that name. ``further_guidances`` are searched if the best lies beyond the scale's.
    ``guidance`` is that of the recipe for these data.
    """

    name: str
    dataset: str
    data: DataConfig
    image_size: int
    channels: int
    num_classes: int
    patch_size: int
    state_dim: int
    batch_size: int
    length: int = 1
    t_min: float = 0.9
    input_noise: float = 0.1
    further_guidances: tuple[float, ...] = ()
    guidance: float = 1.5
    lengthens: str = ""

    @property
    def tokens(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2


_FASHION = DataConfig(source="idx:/usr/share/datasets/fashion-mnist", fit=Fit.PAD)
_EMOJI = DataConfig(source="emoji")

_SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="digits-16", dataset="digits", data=DataConfig(source="digits"), image_size=8, channels=1,
            num_classes=10, patch_size=2, state_dim=4, batch_size=64, length=2,
        ),
        Setting(
            name="fashion-16", dataset="fashion", data=_FASHION, image_size=32, channels=1,
            num_classes=10, patch_size=8, state_dim=8, batch_size=64, length=2, t_min=0.95,
        ),
        Setting(
            name="fashion-64", dataset="fashion", data=_FASHION, image_size=32, channels=1,
            num_classes=10, patch_size=4, state_dim=6, batch_size=32,
        ),
        Setting(
            name="emoji-16", dataset="emoji", data=_EMOJI, image_size=64, channels=3,
            num_classes=9, patch_size=16, state_dim=16, batch_size=64, length=2, t_min=0.6, input_noise=0.5,
            further_guidances=(4.0, 6.0, 9.0), guidance=3.0,
        ),
        Setting(
            name="emoji-64", dataset="emoji", data=_EMOJI, image_size=64, channels=3,
            num_classes=9, patch_size=8, state_dim=12, batch_size=32, t_min=0.6, input_noise=0.5,
            further_guidances=(4.0, 6.0, 9.0), guidance=3.0,
        ),
        # The same pictures in as many tokens of 48 numbers as emoji-16 has of 768.
        Setting(
            name="emoji-16-small", dataset="emoji", data=_EMOJI, image_size=16, channels=3,
            num_classes=9, patch_size=4, state_dim=12, batch_size=64, length=2, t_min=0.6, input_noise=0.5,
            further_guidances=(4.0, 6.0, 9.0), guidance=3.0,
        ),
    )
}  # fmt: skip

LONGER = 4
"""Factor by which the study `length` lengthens a training."""

# Settings that begin where the study `length` ends. That study lengthens them again; others ask about long trainings.
_LONG = {
    f"{name}-long": replace(
        _SETTINGS[name], name=f"{name}-long", length=LONGER * _SETTINGS[name].length, lengthens=name
    )
    for name in ("fashion-64", "emoji-64")
}
SETTINGS = _SETTINGS | _LONG

SEEDS = 3
"""The fewest seeds that give a mean and a spread."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the models, the length of training, and the number of judged samples.

    ``samples`` generated images judge a run at each of ``guidances``; ``batch_factor`` multiplies a setting's batch.
    A ``brief`` scale runs one seed in the fewest settings that answer a study, within an hour, by default.
    """

    name: str
    width: int
    depth: int
    heads: int
    codec_depth: int
    head_depth: int
    steps: int
    batch_factor: int
    samples: int
    guidances: tuple[float, ...]
    lr: float = 2e-3
    brief: bool = False

    @property
    def seeds(self) -> int:
        """Number of seeds without `--seeds`."""
        return 1 if self.brief else SEEDS


_SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="cpu", width=64, depth=4, heads=2, codec_depth=2, head_depth=2,
            steps=1_200, batch_factor=1, samples=2_000, guidances=(1.0, 1.5, 2.0, 3.0), brief=True,
        ),
        Scale(
            name="gpu", width=256, depth=8, heads=4, codec_depth=4, head_depth=3, lr=5e-4,
            steps=30_000, batch_factor=8, samples=10_000, guidances=(1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
        ),
    )
}  # fmt: skip
SCALES = _SCALES | {
    "cpu-wide": replace(_SCALES["cpu"], name="cpu-wide", width=128, heads=4, lr=1e-3),
    "gpu-short": replace(_SCALES["gpu"], name="gpu-short", steps=1_000, samples=2_000, guidances=(1.5,), brief=True),
    "smoke": replace(_SCALES["cpu"], name="smoke", steps=4, samples=64, guidances=(1.5,)),
}
"""Further scales: cpu at twice the width, to see whether an order lasts; the models of scale gpu for minutes; and a
check that a study runs at all. Figures of the last two say little."""


def find_setting(name: str) -> Setting:
    """A setting by its name.

    Raises:
        PraError: there is none; the nearest name is given.
    """
    if name not in SETTINGS:
        raise PraError(f"no setting {name!r}{nearest(name, SETTINGS)}")
    return SETTINGS[name]


def find_scale(name: str) -> Scale:
    """A scale by its name.

    Raises:
        PraError: there is none; the nearest name is given.
    """
    if name not in SCALES:
        raise PraError(f"no scale {name!r}{nearest(name, SCALES)}")
    return SCALES[name]


def base(setting: Setting, scale: Scale) -> RunConfig:
    """PRA in a setting at a scale, which every other system of the studies changes."""
    steps = scale.steps * setting.length
    transformer = TransformerConfig(depth=scale.depth, width=scale.width, heads=scale.heads)
    codec = CodecConfig(
        state_dim=setting.state_dim,
        encoder=EncoderConfig(depth=1, width=scale.width, sees_condition=False),
        decoder=replace(transformer, depth=scale.codec_depth),
    )
    return RunConfig(
        recipe=setting.name,
        model=ModelConfig(
            image_size=(setting.image_size, setting.image_size),
            channels=setting.channels,
            patch_size=setting.patch_size,
            num_classes=setting.num_classes,
            class_tokens=4,
            backbone=transformer,
            head=HeadConfig(depth=scale.head_depth, width=scale.width, modulations=1),
            codec=codec,
        ),
        data=setting.data,
        train=TrainConfig(
            steps=steps,
            batch_size=setting.batch_size * scale.batch_factor,
            rollout=Parallel(t_min=setting.t_min),
            objective=ObjectiveConfig(noise_draws=2),
            optimizer=OptimizerConfig(
                lr=scale.lr,
                warmup_steps=max(1, steps // 20),
                schedule=LearningRate.COSINE,
                # An average over the last eighth of the run, by when the cosine has brought the rate down.
                ema_decay=1.0 - 8.0 / max(16, steps),
            ),
            sample_every=steps,
            checkpoint_every=max(1, min(500, steps)),
            keep_checkpoints=1,
        ),
        sampling=SamplingConfig(guidance=1.5, steps=5),
    )
