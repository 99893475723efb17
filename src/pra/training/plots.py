"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pra.images import write_atomically
from pra.training.run import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = "curves.png"
COLOURS = ("#08519c", "#d95f0e", "#756bb1", "#31a354")
PANELS = {
    "flow": "L_flow (head)",
    "reconstruction": "L_rec (codec)",
    "auxiliary": "L_aux",
    "state_std": "smallest state deviation",
    "gradient_norm": "gradient norm",
    "images_per_second": "images / s",
}
LOGARITHMIC = ("flow", "reconstruction", "auxiliary", "gradient_norm")
"""Panels with a logarithmic axis, where all values are positive."""


def draw_curves(run: Path) -> Path | None:
    """Writes ``curves.png``, one panel per metric; None where there is nothing to draw, or matplotlib is missing."""
    rows = read_metrics(run)
    if len(rows) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    figure = curves({run.name: rows}, PANELS)
    path = run / CURVES
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]], names: Iterable[str]) -> Figure:
    """The metrics of runs, a panel each, three in a row. Needs matplotlib.

    Args:
        runs: by what they are called, the lines of ``metrics.jsonl`` (:func:`pra.training.run.read_metrics`).
        names: of the metrics, among :data:`PANELS`.
    """
    from matplotlib.figure import Figure

    shown = list(names)
    across = min(3, len(shown))
    figure = Figure(figsize=(4 * across, 3 * -(-len(shown) // across)), layout="constrained")
    panels = figure.subplots(-(-len(shown) // across), across, squeeze=False).flat
    for axes, name in zip(panels, shown, strict=True):
        for (run, rows), colour in zip(runs.items(), itertools.cycle(COLOURS)):
            steps, values = ([row[key] for row in rows] for key in ("step", name))
            axes.plot(steps, values, color=colour, linewidth=1.2, label=run)
        axes.set(title=PANELS[name], xlabel="step")
        if name in LOGARITHMIC and all(row[name] > 0 for rows in runs.values() for row in rows):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), frameon=False)
    return figure
