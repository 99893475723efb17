"""The curves of runs over each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pra.compare.columns import Column
from pra.errors import PraError
from pra.extras import import_failed
from pra.images import check_free
from pra.training.plots import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("flow", "reconstruction", "state_std")
HIGHEST = 3
"""The axes' end, in the highest value of the first run: a loss that explodes would hide the others."""


def check_picture(path: Path) -> None:
    """Refuses what would overwrite, cannot be written, or is no picture.

    Raises:
        PraError: it is.
    """
    if path.suffix.lower() != ".png":
        raise PraError(f"{path}: the curves are a picture; use FILE.png")
    check_free(path)


def overlaid(columns: Sequence[Column]) -> Figure:
    """The curves of those columns that are runs.

    Raises:
        PraError: none is, or matplotlib is missing.
    """
    metrics = {column.name: column.run.metrics for column in columns if column.run}
    if not metrics:
        raise PraError("--out draws the curves of runs, and these are all files of figures; leave it out, or add a run")
    try:
        figure = curves(metrics, SHOWN)
    except ImportError as error:
        raise PraError(import_failed("--out", "matplotlib", "train", error)) from None
    first = next(iter(metrics.values()))
    for axes, name in zip(figure.axes, SHOWN, strict=True):
        if highest := max(row[name] for row in first):
            axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST * highest))
    return figure
