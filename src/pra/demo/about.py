"""What a model is: from its configuration, and from the run's folder where there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pra.config import to_dict
from pra.demo.exhibit import Exhibit
from pra.models import Model, count_parameters
from pra.report.charts import Chart
from pra.report.content import Picture, curves, pictures, progress
from pra.report.words import COLOURS, in_words
from pra.weights import read_json


@dataclass(frozen=True)
class About:
    """What a model is.

    Args:
        name: the model's.
        facts: what and how much, in the order to be read.
        curves: the training's metrics.
        samples: grids of samples by training step, of :attr:`grids` in all.
        missing: why there are no curves and samples, where there are none.
    """

    name: str
    facts: dict[str, str]
    curves: list[Chart] = field(default_factory=list)
    samples: list[Picture] = field(default_factory=list)
    grids: int = 0
    missing: str = ""


def describe(exhibit: Exhibit) -> About:
    """Reads the run's folder anew: a run that still trains has more to show every time.

    Raises:
        PraError: a file there is damaged.
    """
    parameters = {"Parameters": _parameters(exhibit.model)}
    run, config = exhibit.run, exhibit.config
    if run is None or config is None:
        why = "This is a saved model without the folder of its run: how it was trained is not told."
        return About(exhibit.name, _model_in_words(exhibit.model) | parameters, missing=why)
    facts = {"Recipe": config.recipe, **in_words(config), **parameters, "Weights": exhibit.folder.name}
    done = progress(run, config)
    if done is not None:
        facts["Progress"] = f"{done.steps:,} steps, {done.epochs:.1f} epochs, {done.images_per_second:.0f} images/s"
    if (run / "environment.json").exists():
        facts["Trained with"] = _origin(read_json(run / "environment.json"))
    samples, grids = pictures(run, "samples")
    charts = curves(run)
    why = "" if charts or samples else "The run's folder holds no metrics and no samples yet."
    return About(exhibit.name, facts, charts, samples, grids, why)


def _model_in_words(model: Model) -> dict[str, str]:
    config, how = model.config, to_dict(model.sampling)
    height, width = config.image_size
    colours = COLOURS.get(config.channels, f"{config.channels} channels")
    return {
        "Model": type(model).__name__,
        "Images": f"{height} x {width}, {colours}, {config.num_classes} classes",
        "Patches": f"{config.num_patches} of {config.patch_size} x {config.patch_size} pixels",
        "Sampling": f"{how['solver']}, {how['steps']} steps; guidance {how['guidance']:g}",
    }


def _parameters(model: Model) -> str:
    parts = count_parameters(model.config)
    listed = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parts.items() if count)
    return f"{sum(parts.values()) / 1e6:.2f} M ({listed})"


def _origin(environment: dict[str, Any]) -> str:
    versions, hardware = environment.get("versions") or {}, environment.get("hardware") or {}
    told = [f"{name} {versions[name]}" for name in ("pra", "torch") if versions.get(name)]
    told += [f"commit {environment['commit'][:12]}"] if environment.get("commit") else []
    told += [hardware["device"]] if hardware.get("device") else []
    return ", ".join(told) or "not told"
