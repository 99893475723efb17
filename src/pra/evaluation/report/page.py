"""The page ``report.html``: one file that shows a run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from pra.config import RunConfig, to_dict
from pra.evaluation.report import content
from pra.evaluation.report.content import in_words
from pra.evaluation.rollout_gap import read_gap
from pra.models.weights import newest_checkpoint, read_json
from pra.training.callbacks import GRID_CLASSES
from pra.training.run import read_run, recorded
from pra.utils.files import write_atomically
from pra.utils.provenance import DISTRIBUTION, package_version

REPORT = "report.html"


def write_report(run: Path, out: Path | None = None, gap: Any = None, no_gap: str | None = None) -> Path:
    """Write the page of a run's folder to ``out``, by default ``report.html`` there, in place of an older one.

    Nothing is measured here: ``gap`` is by default the one measured last, ``no_gap`` why it could not be. What the
    folder does not hold yet is left out, with a line how to make it. Refuse damaged files, and a folder without a run.
    """
    text = _template().render(_page(run, read_run(run), gap or read_gap(run), no_gap))
    path = out or run / REPORT
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


@functools.cache
def _template() -> Template:
    # Escape everything: names of classes, files and folders are other people's text.
    environment = content.templates("pra.evaluation.report", autoescape=True, undefined=StrictUndefined)
    environment.filters["duration"] = content.duration
    return environment.get_template("page.html")


def _page(run: Path, config: RunConfig, gap: dict[str, Any] | None, no_gap: str | None) -> dict[str, Any]:
    samples, sample_grids = content.pictures(run, "samples")
    reconstructions, reconstruction_grids = content.pictures(run, "reconstructions")
    parameters, arithmetic = content.costs(config)
    checkpoint = newest_checkpoint(run)
    if not config.model.autoregressive:
        gap, no_gap = None, f"{config.model.name} makes all patches at once: there is no rollout, and no gap."
    return {
        "run": str(run),
        "name": run.resolve().name,
        "config": config,
        "settings": json.dumps(to_dict(config), indent=2),
        "words": in_words(config),
        "progress": content.progress(run, config),
        "checkpoint": checkpoint.name if checkpoint else None,
        "classes": content.named(read_json(checkpoint / "config.json")["classes"]) if checkpoint else [],
        "shown_classes": GRID_CLASSES,
        "samples": samples,
        "sample_grids": sample_grids,
        "reconstructions": reconstructions,
        "reconstruction_grids": reconstruction_grids,
        "curves": content.curves(run, config),
        "gap": gap,
        "no_gap": no_gap,
        "gap_curves": content.gap_curves(gap, config.model.grid[1]) if gap else None,
        "figures": [content.figures_in_words(*one, checkpoint) for one in content.evaluations(run).items()],
        "parameters": parameters,
        "arithmetic": arithmetic,
        "origin": content.origin(recorded(run)),
        "version": package_version(DISTRIBUTION),
    }
