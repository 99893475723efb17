"""One complete run."""

from __future__ import annotations

from dataclasses import dataclass

from pra.config.checks import Settings, wrong
from pra.config.data import DataConfig
from pra.config.model import AnyModelConfig
from pra.config.rollout import Clean
from pra.config.sampling import SamplingConfig, check_sampling
from pra.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Targets(Settings):
    """Published figures that a recipe is to be held against."""

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
            raise wrong(
                "train.codec_warmup", train.codec_warmup, "finds no codec in this model. Set train.codec_warmup=0"
            )
        if train.validate_every and self.data.validation is None:
            fix = "Set data.validation, for example to 0.05, or train.validate_every=0"
            raise wrong("train.validate_every", train.validate_every, f"finds no held-out images. {fix}")
        if train.trainable == ("shortcut",) and not (self.model.has_shortcut and self.initial):
            problem = "is for the second head (model.head.shortcut) of a trained model (initial)"
            raise wrong("train.trainable", "shortcut", f"{problem}. Set all three with `pra distill RUN`")
