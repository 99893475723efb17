"""How images are read and prepared."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

from pra.config.checks import Settings, within, wrong


class Fit(enum.Enum):
    """How an image comes to the model's size: scaled and centre-cropped as in ADM, randomly cropped, padded."""

    CENTER_CROP = "center-crop"
    RANDOM_CROP = "random-crop"
    PAD = "pad"


class OnSmall(enum.Enum):
    """What to do with an image smaller than the crop: stop, or enlarge it (as ADM does)."""

    ERROR = "error"
    UPSCALE = "upscale"


class OnCorrupt(enum.Enum):
    """What to do with an image that cannot be read: stop, or take the next one and count."""

    ERROR = "error"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where images come from (see :func:`pra.data.open_source`) and how they are prepared.

    ``validation`` names the held-out images that ``train.validate_every`` measures the loss on: a share of the training
    images, such as ``0.05``, which the run then does not learn from; ``test``, the source's own test split; or another
    source, such as ``folder:VAL``. None holds nothing out.
    """

    source: str
    fit: Fit = Fit.CENTER_CROP
    flip: bool = False
    on_small: OnSmall = OnSmall.ERROR
    on_corrupt: OnCorrupt = OnCorrupt.ERROR
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
