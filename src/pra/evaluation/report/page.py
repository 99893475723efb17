"""The page ``report.html``: one file that shows a run."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from pra.config import RunConfig, to_dict
from pra.evaluation.report import charts, content
from pra.evaluation.report.gap import MeasuredGap, read_gap
from pra.evaluation.report.words import in_words
from pra.models.weights import newest_checkpoint, read_json
from pra.training.callbacks import GRID_CLASSES
from pra.training.run import read_run, recorded
from pra.utils.files import write_atomically
from pra.utils.provenance import DISTRIBUTION, package_version

REPORT = "report.html"


def write_report(run: Path, out: Path | None = None, gap: MeasuredGap | None = None, no_gap: str | None = None) -> Path:
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
    options: Any = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("pra.evaluation.report", ""), **options)
    environment.filters["duration"] = _duration
    return environment.get_template("page.html")


def _page(run: Path, config: RunConfig, gap: MeasuredGap | None, no_gap: str | None) -> dict[str, Any]:
    samples, sample_grids = content.pictures(run, "samples")
    reconstructions, reconstruction_grids = content.pictures(run, "reconstructions")
    parameters, arithmetic = content.costs(config)
    checkpoint = newest_checkpoint(run)
    return {
        "run": str(run),
        "name": run.resolve().name,
        "config": config,
        "settings": json.dumps(to_dict(config), indent=2),
        "words": in_words(config),
        "progress": content.progress(run, config),
        "checkpoint": checkpoint.name if checkpoint else None,
        "classes": _classes(checkpoint),
        "shown_classes": GRID_CLASSES,
        "samples": samples,
        "sample_grids": sample_grids,
        "reconstructions": reconstructions,
        "reconstruction_grids": reconstruction_grids,
        "curves": content.curves(run, config),
        "gap": _gap(run, config, gap, no_gap),
        "figures": [content.figures_in_words(*one, checkpoint) for one in content.evaluations(run).items()],
        "parameters": parameters,
        "arithmetic": arithmetic,
        "origin": _origin(recorded(run)),
        "chart": charts,
        "version": package_version(DISTRIBUTION),
    }


def _classes(checkpoint: Path | None) -> list[str]:
    """Return the names of the samples' rows; none where they are mere numbers."""
    names = read_json(checkpoint / "config.json").get("classes") if checkpoint else None
    known = [str(name) for name in names] if isinstance(names, list) else []
    return known if any(name != str(place) for place, name in enumerate(known)) else []


def _gap(run: Path, config: RunConfig, measured: MeasuredGap | None, why: str | None) -> dict[str, Any]:
    if not config.model.autoregressive:
        measured, why = None, f"{config.model.name} makes all patches at once: there is no rollout, and no gap."
    if measured is None:
        return {"measured": None, "why": why}
    newest = newest_checkpoint(run)
    return {
        "measured": measured,
        "why": why,
        "stale": newest is not None and newest.name != measured.checkpoint,
        "charts": content.gap_charts(measured, config.model.grid[1]),
    }


def _duration(seconds: float) -> str:
    """Return ``"2 h 05 min"``, ``"3 min 20 s"`` or ``"12 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, part = divmod(minutes, 60)
    if hours:
        return f"{hours} h {part:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _origin(environment: dict[str, Any]) -> dict[str, str]:
    lines: dict[str, Any] = {}
    if isinstance(environment.get("command"), list):
        lines["command"] = content.command_line(environment["command"])
    lines |= {"commit": environment.get("commit"), "platform": environment.get("platform")}
    for part in ("hardware", "versions"):
        values = environment.get(part)
        if isinstance(values, dict):
            lines[part] = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return {name: str(value) for name, value in lines.items() if value}
