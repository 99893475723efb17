"""The models on show."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pra.config import DataConfig, Fit, OnSmall, RunConfig
from pra.errors import PraError
from pra.models import Model, weights
from pra.sampling import Samplers
from pra.training.run import read_run
from pra.utils.hub import PREFIX, is_address


@dataclass(frozen=True)
class Exhibit:
    """A model on show.

    Args:
        name: the folder's, for people.
        folder: of the weights: a checkpoint, or a saved model.
        run: the folder of the run that the weights are from, if it is there.
        config: that run's.
        model: in evaluation mode.
    """

    name: str
    folder: Path
    run: Path | None
    config: RunConfig | None
    model: Model

    @functools.cached_property
    def samplers(self) -> Samplers:
        """The model's samplers, for all visitors."""
        return Samplers(self.model)

    @property
    def data(self) -> DataConfig:
        """How a picture is brought to the model's size: as in training, and enlarged where it is too small."""
        fit = self.config.data.fit if self.config else Fit.CENTER_CROP
        return DataConfig(source="", fit=Fit.PAD if fit is Fit.PAD else Fit.CENTER_CROP, on_small=OnSmall.UPSCALE)


def load_exhibits(
    places: Sequence[Path | None], device: torch.device, average: str = weights.EMA
) -> tuple[Exhibit, ...]:
    """Load one or two models.

    Args:
        places: runs, checkpoints, saved models or ``hub:user/model``; ``None`` is the model that pra ships.
        device: where to put the models.
        average: which weights, as in :func:`pra.load`.

    Raises:
        PraError: as :func:`pra.load`, or two models whose classes differ: a choice must mean the same for both.
    """
    names = [_short(place) for place in places]
    if len(set(names)) < len(names):
        names = [str(place or name) for place, name in zip(places, names, strict=True)]
    exhibits = []
    for place, name in zip(places, names, strict=True):
        folder = weights.model_folder(place)
        run = weights.run_of(folder)
        model = weights.load(folder, average, device)
        exhibits.append(Exhibit(name, folder, run, read_run(run) if run else None, model))
    classes = [exhibit.model.classes for exhibit in exhibits]
    if classes[0] != classes[-1]:
        shown = "; ".join(f"{len(found)}: {', '.join(found[:3])} ..." for found in classes)
        problem = f"{' and '.join(names)} have different classes ({shown})"
        raise PraError(f"{problem}. Show runs on the same data side by side, or one at a time", code="mismatch")
    return tuple(exhibits)


def _short(place: Path | None) -> str:
    """Return ``demo`` for ``runs/demo``, ``user/model`` for ``hub:user/model``."""
    if place is None:
        return "the model that comes with pra"
    return str(place).removeprefix(PREFIX) if is_address(place) else place.expanduser().absolute().name
