"""One complete run, and where its images come from."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

from pra.config.checks import Settings, within, wrong
from pra.config.model import AnyModelConfig
from pra.config.sampling import SamplingConfig, check_sampling
from pra.config.training import Clean, TrainConfig
from pra.errors import PraError


class Fit(enum.Enum):
    """Way to bring an image to the model's size: scaled and centre-cropped as in ADM, randomly cropped, padded."""

    CENTER_CROP = "center-crop"
    RANDOM_CROP = "random-crop"
    PAD = "pad"


class OnSmall(enum.Enum):
    """The policy for an image smaller than the crop: stop, or enlarge it (as ADM does)."""

    ERROR = "error"
    UPSCALE = "upscale"


class OnCorrupt(enum.Enum):
    """The policy for an image that cannot be read, or has no caption: stop, or take the next one and count."""

    ERROR = "error"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The source of images (see :func:`pra.data.open_source`) and how they are prepared.

    ``validation`` names the held-out images that ``train.validate_every`` measures the loss on: a share of the training
    images, such as ``0.05``, which the run then does not learn from; ``test``, the source's own test split; or another
    source, such as ``folder:VAL``. None holds nothing out. ``on_caption`` applies to models that learn from captions.
    """

    source: str
    fit: Fit = Fit.CENTER_CROP
    flip: bool = False
    on_small: OnSmall = OnSmall.ERROR
    on_corrupt: OnCorrupt = OnCorrupt.ERROR
    on_caption: OnCorrupt = OnCorrupt.ERROR
    workers: Annotated[int, within(0, 1024)] = 0
    validation: float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise wrong("validation", self.validation, "must lie between 0 and 1. Use a share such as 0.05", "invalid")

    @property
    def held_out_share(self) -> float | None:
        """The share of the training images that is held out, if any."""
        return self.validation if isinstance(self.validation, float) else None


@dataclass(frozen=True, kw_only=True)
class Targets(Settings):
    """Published figures to compare a recipe with."""

    source: str
    parameters: float | None = None
    fid_50k: float | None = None
    linear_probe: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One complete run: what a recipe returns and what ``config.json`` in a run's folder holds.

    ``initial`` names the first weights: a run's folder, a saved model or ``hub:user/model``, of the same model but for
    its classes, and perhaps without the second head (:mod:`pra.training.initial`); None draws new ones.
    ``initial_average`` says which of its weights, as :func:`pra.load` takes it.
    """

    recipe: str
    model: AnyModelConfig
    data: DataConfig
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009  (frozen)
    targets: Targets | None = None
    initial: str | None = None
    initial_average: str = "ema"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampling(self.model, self.sampling)
        train = self.train
        if not self.model.autoregressive and train.rollout != Clean():
            problem = "is for autoregressive models. Set train.rollout=Clean"
            raise wrong("train.rollout", type(train.rollout).__name__, problem)
        if self.model.codec is None and train.codec_warmup:
            problem = "needs a codec, which this model lacks. Set train.codec_warmup=0"
            raise wrong("train.codec_warmup", train.codec_warmup, problem)
        if train.validate_every and self.data.validation is None:
            fix = "Set data.validation, for example to 0.05, or train.validate_every=0"
            raise wrong("train.validate_every", train.validate_every, f"needs held-out images. {fix}")
        if train.trainable == ("shortcut",) and not (self.model.has_shortcut and self.initial):
            problem = "is for the second head (model.head.shortcut) of a trained model (initial)"
            raise PraError(f"train.trainable=shortcut {problem}. Set all three with `pra distill RUN`", code="conflict")
