"""The curves of runs over each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pra.errors import PraError
from pra.evaluation.compare.columns import Column
from pra.training.plots import OTHERS, curves
from pra.training.run import loss_terms, points_of
from pra.utils.extras import import_failed
from pra.utils.files import check_free

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIGHEST = 3
"""An axis ends at this multiple of the first run's highest value: a loss that explodes would hide the others."""


def check_picture(path: Path) -> None:
    """Refuse a path that would overwrite, cannot be written, or is not a PNG."""
    if path.suffix.lower() != ".png":
        raise PraError(f"{path}: the curves are written as .png. Use FILE.png", path=path)
    check_free(path)


def overlaid(columns: Sequence[Column]) -> Figure:
    """Draw the curves of those columns that are runs; refuse columns without a run, or without matplotlib."""
    metrics = {column.name: column.run.metrics for column in columns if column.run}
    if not metrics:
        raise PraError("--out draws the curves of runs: there are none. Leave it out, or add a run", option="--out")
    titles = {name: name for name in loss_terms(itertools.chain(*metrics.values()))}
    titles["state_std"] = OTHERS["state_std"]
    try:
        figure = curves(metrics, titles)
    except ImportError as error:
        raise PraError(import_failed("--out", "matplotlib", "train", error), "not-installed") from None
    for axes, name in zip(figure.axes, titles, strict=True):
        first = next(points for rows in metrics.values() if (points := points_of(rows, name)))
        if highest := max(value for _, value in first):
            axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST * highest))
    return figure
