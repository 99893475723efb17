"""Pictures of a sweep: figures as curves, and the same classes and seeds drawn with each of the settings."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from pra.evaluation.report.content import cell
from pra.evaluation.sweep.points import Point, value_text
from pra.evaluation.sweep.results import Result, find_best, rank
from pra.utils.files import write_atomically
from pra.utils.pixels import contact_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, SAMPLES = "sweep.png", "samples.jpg"
COLUMNS = 10
COLOURS = ("#08519c", "#d95f0e", "#756bb1", "#31a354", "#636363", "#a63603")
"""Of as many lines as can be told apart."""
ROWS = 20
"""Combinations in the picture of samples, the best ones."""


def write_strip(images: Tensor, point: Point, folder: Path) -> None:
    """Write the first images of a point, side by side, beside its figures."""
    strip = contact_sheet(images, COLUMNS)
    write_atomically(folder / f"{point.name}.png", lambda file: strip.save(file, "PNG"))


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the curves and all strips below each other; return the files, none where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    written = []
    for name, figure in ((CURVES, curves(results)), (SAMPLES, _samples(results, folder))):
        if figure is not None:
            kind = Path(name).suffix[1:]
            write_atomically(folder / name, lambda file, of=figure, kind=kind: of.savefig(file, format=kind, dpi=110))
            written.append(folder / name)
    return written


def _samples(results: Sequence[Result], folder: Path) -> Figure | None:
    rows = []
    for result in sorted(results, key=rank)[:ROWS]:
        # A sweep that was stopped between strip and figures leaves a strip missing or damaged.
        with contextlib.suppress(OSError), Image.open(folder / f"{result.point.name}.png") as strip:
            lines = [f"{name} {value_text(value)}" for name, value in result.point.changes.items()]
            rows.append(("\n".join([*lines, f"FID {cell(result.figure('fid'))}"]), strip.copy()))
    return labelled_rows(rows) if rows else None


def curves(results: Sequence[Result]) -> Figure | None:
    """Draw FID, precision and recall along the first setting with several numbers, a line per value of the others."""
    from matplotlib.figure import Figure

    axis = next((name for name in results[0].point.changes if _varies(name, results)), None)
    if axis is None:
        return None
    lines: dict[str, list[Result]] = {}
    for result in results:
        others = (f"{name} {value_text(value)}" for name, value in result.point.changes.items() if name != axis)
        lines.setdefault(", ".join(others), []).append(result)
    # The lines of the best FIDs, where there are more than can be told apart.
    ranked = sorted(lines, key=lambda name: min(map(rank, lines[name])))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    if len(lines) > len(COLOURS):
        figure.suptitle(f"the {len(COLOURS)} best of {len(lines)} lines", fontsize=10)
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("fid", "precision", "recall"), strict=True):
        for line, colour in zip(ranked, COLOURS, strict=False):
            known = sorted((r.point.changes[axis], r.figure(name)) for r in lines[line] if r.figure(name) is not None)
            axes.plot(*zip(*known, strict=True) if known else ([], []), marker="o", color=colour, label=line)
        axes.set(xlabel=axis, title=name.upper() if name == "fid" else name)
        axes.grid(alpha=0.3)
    best = find_best(results)
    if best is not None:
        panels[0].plot(best.point.changes[axis], best.figure("fid"), "o", ms=12, mfc="none", mec="black")
    if len(lines) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _varies(name: str, results: Sequence[Result]) -> bool:
    values = [result.point.changes[name] for result in results]
    return len(set(map(str, values))) > 1 and all(type(value) in (int, float) for value in values)


def labelled_rows(rows: Sequence[tuple[str, Image.Image]]) -> Figure:
    """Draw pictures of one size, grey or RGB, below each other with titles on the left. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.82 * len(rows)))
    panels = figure.subplots(
        len(rows), 1, squeeze=False, gridspec_kw={"left": 0.19, "right": 1, "bottom": 0, "top": 1, "hspace": 0}
    )
    for axes, (title, picture) in zip(panels.flat, rows, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure
