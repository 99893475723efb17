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
        """How a picture of any size comes to the model's: as in training; enlarged, where it is too small."""
        fit = self.config.data.fit if self.config else Fit.CENTER_CROP
        return DataConfig(source="", fit=Fit.PAD if fit is Fit.PAD else Fit.CENTER_CROP, on_small=OnSmall.UPSCALE)


def load_exhibits(
    places: Sequence[Path | None], device: torch.device, average: str = weights.EMA
) -> tuple[Exhibit, ...]:
    """One or two models.

    Args:
        places: runs, checkpoints, saved models or ``hub:user/model``; None is the model that comes with the package.
        device: where to put the models.
        average: which weights, as in :func:`pra.load`.

    Raises:
        PraError: as :func:`pra.load`, or two models whose classes differ: one choice has to mean the same for both.
    """
    names = [_short(place) for place in places]
    if len(set(names)) < len(names):
        names = [str(place or name) for place, name in zip(places, names, strict=True)]
    exhibits = tuple(_load(place, name, device, average) for place, name in zip(places, names, strict=True))
    for other in exhibits[1:]:
        if other.model.classes != exhibits[0].model.classes:
            known = "; ".join(_few(exhibit.model.classes) for exhibit in (exhibits[0], other))
            raise PraError(
                f"{exhibits[0].name} and {other.name} have different classes ({known}); show runs on the same data "
                "side by side, or one at a time"
            )
    return exhibits


def _load(place: Path | None, name: str, device: torch.device, average: str) -> Exhibit:
    folder = weights.model_folder(place)
    run = weights.run_of(folder)
    return Exhibit(name, folder, run, read_run(run) if run else None, weights.load(folder, average, device))


def _short(place: Path | None) -> str:
    """``demo`` of ``runs/demo``, ``user/model`` of ``hub:user/model``."""
    if place is None:
        return "the model that comes with pra"
    return str(place).removeprefix(PREFIX) if is_address(place) else place.expanduser().absolute().name


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}, ... ({len(names)})" if len(names) > 3 else ", ".join(names)
