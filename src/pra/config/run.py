"""One complete run."""

from __future__ import annotations

from dataclasses import dataclass, field

from pra.config.checks import coerce
from pra.config.data import DataConfig
from pra.config.model import AnyModelConfig
from pra.config.rollout import Clean
from pra.config.sampling import SamplingConfig, check_sampling
from pra.config.training import TrainConfig
from pra.errors import PraError


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Published figures that a recipe is to be held against."""

    source: str
    parameters: float | None = None
    fid_50k: float | None = None
    linear_probe: float | None = None

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run: what a recipe returns and what ``config.json`` in a run's folder holds.

    ``initial`` is what the weights are at first: a run's folder, a saved model or ``hub:user/model``, of the same model
    but for its classes, and perhaps without the second head (:mod:`pra.training.initial`); None is new ones.
    ``initial_average`` says which of its weights, as :func:`pra.load` takes it.
    """

    recipe: str
    model: AnyModelConfig
    data: DataConfig
    train: TrainConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    targets: Targets | None = None
    initial: str | None = None
    initial_average: str = "ema"

    def __post_init__(self) -> None:
        coerce(self)
        check_sampling(self.model, self.sampling)
        if not self.model.autoregressive and self.train.rollout != Clean():
            raise PraError(
                f"train.rollout {type(self.train.rollout).__name__} is for autoregressive models: "
                f"{self.model.name} has no prefix to roll out; set train.rollout=Clean"
            )
        if self.model.codec is None and self.train.codec_warmup:
            raise PraError(f"train.codec_warmup {self.train.codec_warmup}: this model has no codec to warm up; set 0")
        if self.train.validate_every and self.data.validation is None:
            raise PraError(
                f"train.validate_every {self.train.validate_every}: there are no held-out images. Set data.validation, "
                "for example to 0.05, or train.validate_every=0"
            )
        if self.train.trainable == ("shortcut",) and not (self.model.has_shortcut and self.initial):
            raise PraError(
                "train.trainable=shortcut is for the second head (model.head.shortcut) of a model that is trained: "
                "pra distill RUN sets all three"
            )
