"""The models on show, and their descriptions: from a run's folder, or the files beside a saved model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pra.bench.pareto import Tier, offered
from pra.config import DataConfig, Fit, OnSmall, RunConfig
from pra.errors import PraError, one_line
from pra.evaluation.report import (
    Picture,
    curves,
    embedded,
    in_words,
    model_in_words,
    origin,
    pictures,
    progress,
)
from pra.models import Model, count_parameters, weights
from pra.sampling import Samplers
from pra.sharing.card import CARD, SAMPLES, read_card
from pra.training.plots import CURVES
from pra.training.run import read_run, recorded
from pra.utils.hub import PREFIX, is_address


@dataclass(frozen=True)
class Exhibit:
    """A model on show, in evaluation mode.

    Its weights are in ``folder``: a checkpoint, or a saved model. ``run`` and ``config`` are those of the run that the
    weights are from, if its folder is there. ``tiers`` are what ``pra bench pareto`` found.
    """

    name: str
    folder: Path
    run: Path | None
    config: RunConfig | None
    model: Model
    tiers: tuple[Tier, ...] = ()

    @functools.cached_property
    def samplers(self) -> Samplers:
        """The model's samplers, for all visitors."""
        return Samplers(self.model)

    @property
    def takes_class(self) -> bool:
        """Whether a visitor chooses a class: a model that reads captions may have only one."""
        return len(self.model.classes) > 1 or not self.reads_captions

    @property
    def reads_captions(self) -> bool:
        """Whether the model reads captions."""
        return self.model.config.text is not None

    @property
    def data(self) -> DataConfig:
        """Setting of how a picture is brought to the model's size: as in training, and enlarged if it is too small."""
        fit = self.config.data.fit if self.config else Fit.CENTER_CROP
        return DataConfig(source="", fit=Fit.PAD if fit is Fit.PAD else Fit.CENTER_CROP, on_small=OnSmall.UPSCALE)


@dataclass(frozen=True)
class About:
    """The description of a model: facts by name, lists of pictures by title, and a card in Markdown, if any.

    ``missing`` says what is unknown, and why.
    """

    name: str
    facts: dict[str, str]
    shown: dict[str, list[Picture]]
    card: str = ""
    missing: str = ""


def load_exhibits(
    places: Sequence[Path | None],
    device: torch.device,
    average: str = weights.EMA,
    encoder: Path | None = None,
) -> tuple[Exhibit, ...]:
    """Load one or two models: runs, checkpoints, saved models or ``hub:user/model``; ``None`` is what pra ships.

    ``encoder`` is the folder of their frozen text encoder, if it has moved; a model without one is refused.

    Raises:
        PraError: as :func:`pra.load`, or two models whose classes differ: a choice must mean the same for both. A model
            that reads captions and has one class goes with any other.
    """
    names = [_short(place) for place in places]
    if len(set(names)) < len(names):
        names = [str(place or name) for place, name in zip(places, names, strict=True)]
    exhibits = []
    for place, name in zip(places, names, strict=True):
        folder = weights.model_folder(place, average)
        run = weights.run_of(folder)
        model = weights.load(folder, average, device)
        if encoder is not None:
            model.condition.use(str(encoder.expanduser()))
        tiers = tuple(offered(folder, run, average))
        exhibits.append(Exhibit(one_line(name), folder, run, read_run(run) if run else None, model, tiers))
    classes = [exhibit.model.classes for exhibit in exhibits if exhibit.takes_class]
    if classes and classes[0] != classes[-1]:
        shown = "; ".join(f"{len(found)}: {', '.join(found[:3])} ..." for found in classes)
        problem = f"{' and '.join(names)} have different classes ({shown})"
        raise PraError(f"{problem}. Show runs on the same data side by side, or one at a time", code="mismatch")
    return tuple(exhibits)


def chooser(exhibits: Sequence[Exhibit]) -> Exhibit:
    """Return the exhibit whose classes a visitor chooses from."""
    return next((exhibit for exhibit in exhibits if exhibit.takes_class), exhibits[0])


def _short(place: Path | None) -> str:
    """Return ``demo`` for ``runs/demo``, ``user/model`` for ``hub:user/model``."""
    if place is None:
        return "the model that comes with pra"
    return str(place).removeprefix(PREFIX) if is_address(place) else place.expanduser().absolute().name


def describe(exhibit: Exhibit) -> About:
    """Describe a model. The run's folder is read every time, since a run that trains has new results.

    A model without its run is described by the files that `pra export` puts beside the weights.
    """
    parts = count_parameters(exhibit.model.config)
    listed = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items() if count)
    parameters = {"Parameters": f"{sum(parts.values()) / 1e6:.2f} M ({listed})"}
    folder, run, config = exhibit.folder, exhibit.run, exhibit.config
    if run is None or config is None:
        facts = model_in_words(exhibit.model.config, exhibit.model.sampling) | parameters
        beside = {"Samples": folder / SAMPLES, "Training curves": folder / CURVES}
        shown = {title: [embedded(path)] for title, path in beside.items() if path.exists()}
        card = folder / CARD
        text = read_card(card) if card.exists() else ""
        why = "This is a saved model without the folder of its run"
        why += "." if text else ", without a model card: its training is unknown."
        return About(exhibit.name, facts, shown, text, why)
    facts = {"Recipe": config.recipe, **in_words(config), **parameters, "Weights": folder.name}
    done, made = progress(run, config), origin(recorded(run))
    if done is not None:
        facts["Progress"] = f"{done.steps:,} steps, {done.epochs:.1f} epochs, {done.images_per_second:.0f} images/s"
    facts |= {name.capitalize(): made[name] for name in ("commit", "hardware", "versions") if name in made}
    samples, grids = pictures(run, "samples")
    some = f" ({len(samples)} of {grids} grids)" if grids > len(samples) else ""
    drawn = curves(run, config)
    shown = {"Training curves": [drawn] if drawn else [], f"Samples over training{some}": samples}
    why = "" if done or samples else "The run's folder holds no metrics and no samples yet."
    return About(exhibit.name, facts, shown, missing=why)
