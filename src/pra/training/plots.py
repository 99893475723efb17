"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pra.config import ObjectiveConfig
from pra.training.run import VALIDATION, loss_terms, points_of, read_metrics, read_run
from pra.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

CURVES = "curves.png"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Colours that colour-blind readers tell apart, after Okabe and Ito; :data:`MARKERS` tell runs apart without colour."""
MARKERS = "os^D"
OTHERS = {
    "state_std": "smallest std of the states",
    "gradient_norm": "gradient norm",
    "images_per_second": "images / s",
}
"""Panels after the terms of the loss, with their titles."""

HELD_OUT = " (dashed: held out)"
"""Added to the title of a panel that shows a held-out loss too."""

Rows = Sequence[Mapping[str, float]]
"""Lines of ``metrics.jsonl`` (:func:`pra.training.run.read_metrics`)."""


def draw_curves(run: Path) -> Path | None:
    """Write ``curves.png``, one panel per metric. Return None if there is nothing to draw or matplotlib is missing."""
    rows = read_metrics(run)
    if len(rows) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    figure = curves({run.name: rows}, panels(rows, read_run(run).train.objective))
    path = run / CURVES
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def panels(rows: Rows, objective: ObjectiveConfig) -> dict[str, str]:
    """Return the metrics of one run that have a panel, with the panels' titles: the terms of its loss first.

    A term is drawn without its weight; the title states the weight where it is not 1.
    """
    weights = {name: objective.weight(name) for name in loss_terms(rows)}
    terms = {name: name if weight == 1 else f"{name} (weight {weight:g})" for name, weight in weights.items()}
    return terms | OTHERS


def is_logarithmic(name: str) -> bool:
    """Return whether a metric is drawn on a logarithmic axis, where all its values are positive."""
    return name == "gradient_norm" or name not in OTHERS


def curves(runs: Mapping[str, Rows], titles: Mapping[str, str]) -> Figure:
    """Draw the metrics of runs, a panel each, held-out values dashed. Needs matplotlib.

    Args:
        runs: the lines of every run by its name. A run without a metric has no curve in its panel.
        titles: the panels' titles by metric.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    across = 2 if len(titles) == 4 else min(3, len(titles))
    down = math.ceil(len(titles) / across)
    figure = Figure(figsize=(3.2 * across, 2.5 * down), dpi=140, layout="constrained")
    places = list(figure.subplots(down, across, squeeze=False, sharex=True).flat)
    for place in places[len(titles) :]:
        place.remove()
    lines: dict[str, Line2D] = {}
    for axes, (name, title) in zip(figure.axes, titles.items(), strict=True):
        held_out, positive = False, True
        looks = itertools.cycle(zip(COLOURS, MARKERS, strict=True))
        for (run, rows), (colour, marker) in zip(runs.items(), looks, strict=False):
            for metric, style in ((VALIDATION + name, "--"), (name, "-")):
                if points := points_of(rows, metric):
                    steps, values = zip(*points, strict=True)
                    marked = len(runs) > 1 or len(points) == 1  # a line needs two points
                    (lines[run],) = axes.plot(steps, values, style, color=colour, lw=1.2, label=run)
                    lines[run].set(marker=marker if marked else "", markersize=4, markevery=0.2)
                    held_out, positive = held_out or metric != name, positive and min(values) > 0
        if is_logarithmic(name) and positive:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(_plain(title) + HELD_OUT * held_out, fontsize=10)
        axes.set(xlabel="training steps", ylabel="" if name in OTHERS else "loss")
        axes.tick_params(labelbottom=True)  # a shared axis has numbers in the lowest row alone
    if len(runs) > 1:
        names = list(map(_plain, lines))
        figure.legend(list(lines.values()), names, loc="outside upper center", ncols=len(lines), frameon=False)
    return figure


def _plain(text: str) -> str:
    """Escape the dollar signs of a name: matplotlib reads the text between two of them as a formula."""
    return text.replace("$", r"\$")
