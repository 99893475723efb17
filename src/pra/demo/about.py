"""The description of a model, from its configuration and its run's folder, or the files beside a saved model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pra.demo.exhibit import Exhibit
from pra.evaluation.report.charts import Chart
from pra.evaluation.report.content import Picture, curves, embedded, pictures, progress
from pra.evaluation.report.words import COLOURS, in_words
from pra.models import Model, count_parameters
from pra.models.weights import read_json
from pra.sharing.origin import CARD, SAMPLES
from pra.training.plots import CURVES


@dataclass(frozen=True)
class About:
    """The description of a model.

    Args:
        name: the model's.
        facts: by name, in the order to be read.
        curves: the training's metrics.
        samples: grids of samples by training step.
        grids: how many grids there are in all.
        shown: pictures beside a saved model by title, as a data URI, width and height.
        card: a saved model's card, in Markdown.
        missing: what is not known, and why.
    """

    name: str
    facts: dict[str, str]
    curves: list[Chart] = field(default_factory=list)
    samples: list[Picture] = field(default_factory=list)
    grids: int = 0
    shown: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    card: str = ""
    missing: str = ""


def describe(exhibit: Exhibit) -> About:
    """Describe a model. The run's folder is read every time: a run that trains has more to show.

    Raises:
        PraError: a file there is damaged.
    """
    parts = count_parameters(exhibit.model.config)
    listed = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items() if count)
    parameters = {"Parameters": f"{sum(parts.values()) / 1e6:.2f} M ({listed})"}
    run, config = exhibit.run, exhibit.config
    if run is None or config is None:
        return _saved(exhibit.name, exhibit.folder, exhibit.model, parameters)
    facts = {"Recipe": config.recipe, **in_words(config), **parameters, "Weights": exhibit.folder.name}
    done = progress(run, config)
    if done is not None:
        facts["Progress"] = f"{done.steps:,} steps, {done.epochs:.1f} epochs, {done.images_per_second:.0f} images/s"
    if (run / "environment.json").exists():
        facts["Trained with"] = _origin(read_json(run / "environment.json"))
    samples, grids = pictures(run, "samples")
    charts = curves(run, config)
    why = "" if charts or samples else "The run's folder holds no metrics and no samples yet."
    return About(exhibit.name, facts, charts, samples, grids, missing=why)


def _saved(name: str, folder: Path, model: Model, parameters: dict[str, str]) -> About:
    """Describe a model without its run, from the files that `pra export` puts beside the weights."""
    config, how = model.config, model.sampling
    height, width = config.image_size
    colours = COLOURS.get(config.channels, f"{config.channels} channels")
    facts = {
        "Model": type(model).__name__,
        "Images": f"{height} x {width}, {colours}, {config.num_classes} classes",
        "Patches": f"{config.num_patches} of {config.patch_size} x {config.patch_size} pixels",
        "Sampling": f"{how.solver.value}, {how.steps} steps; guidance {how.guidance:g}",
    }
    beside = {"Samples": folder / SAMPLES, "Training curves": folder / CURVES}
    shown = {title: embedded(path) for title, path in beside.items() if path.exists()}
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    why = "This is a saved model without the folder of its run"
    why += ", and no model card lies beside it: how it was trained is not told." if not text else "."
    return About(name, facts | parameters, shown=shown, card=text, missing=why)


def _origin(environment: dict[str, Any]) -> str:
    versions, hardware = environment.get("versions") or {}, environment.get("hardware") or {}
    told = [f"{name} {versions[name]}" for name in ("pra", "torch") if versions.get(name)]
    told += [f"commit {environment['commit'][:12]}"] if environment.get("commit") else []
    told += [hardware["device"]] if hardware.get("device") else []
    return ", ".join(told) or "not told"
