"""Plots of the studies `rollout-gap`, `solver` and `pareto`."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from studies.groups import groups
from studies.measures import Row
from studies.names import colour_of, name_of
from studies.plot_parts import ON_TOP, banded, legend_beside, logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 1e-4
"""Smallest gap drawn: estimates from a thousand samples cannot tell smaller gaps from zero."""

SOLVERS = {
    "midpoint": "#1b9e77",
    "adams-bashforth": "#d95f02",
    "dpm": "#7570b3",
    "heun": "#666666",
    "euler": "#66a61e",
    "euler-maruyama": "#e6ab02",
    "shortcut": "#e7298a",
}
"""Other colours than those of the systems."""

GRIDS: dict[str, tuple[Any, str]] = {
    "": ("-", "o"),
    "cosine": ("--", "s"),
    "logit-normal": (":", "^"),
    "learnt": ("-.", "D"),
}
WORST = 6.0
"""Upper edge of a plot of solvers, as a multiple of the best FID; higher points are named at the edge."""
DODGE = 0.004
"""Shift between solvers with the same number of evaluations, as a fraction of that number."""


def draw_gap(figure: Figure, rows: list[Row]) -> None:
    """Plot the mean over each row of patches: single positions zigzag, since the first patches of a row know least."""
    panels: list[Axes] = list(figure.subplots(1, 3))
    curves: list[tuple[Axes, Callable[[Row], float | None], float]] = [
        (panels[0], lambda row: row.get("condition_gap"), FLOOR),
        (panels[1], lambda row: row.get("input_gap"), FLOOR),
        (panels[2], _loss_ratio, 0.0),
    ]
    systems = sorted(dict.fromkeys(row["system"] for row in rows), key=lambda system: -_late(rows, system))
    for system in systems:
        own = [row for row in rows if row["system"] == system]
        for axes, figure_of, floor in curves:
            banded(axes, _by_raster_row(own, figure_of, floor), system)
    titles = (
        "Conditions: outputs of the backbone\n(gap between sampling and training)",
        "Inputs of the backbone\n(gap between sampling and training)",
        "Flow loss on the model's own rollouts\nover that in training",
    )
    panels[2].axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    count = math.isqrt(rows[0]["tokens"])
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(1, count + 1))
        axes.set_xlabel("row of patches, from the top")
        logarithmic(axes)
        axes.grid(alpha=0.3)
    legend_beside(figure, panels[0], [name_of(system) for system in systems])
    figure.supxlabel(
        "Gap: energy coefficient. 0: in sampling distributed as in training; 1: as far apart as can be. "
        f"Smaller gaps than {FLOOR:g} are drawn at it. Loss: 1 is as in training.\n"
        "Lines: the mean over seeds and a row of patches; bands: from the least to the greatest seed.",
        fontsize=9,
    )


def _loss_ratio(row: Row) -> float | None:
    if "rollout_loss" not in row or not row.get("training_loss"):
        return None
    return float(row["rollout_loss"] / row["training_loss"])


def _late(rows: list[Row], system: str) -> float:
    """The gap of a system's conditions in the last row of patches, by which the legend is sorted."""
    own = [row for row in rows if row["system"] == system and "condition_gap" in row]
    by_row = _by_raster_row(own, lambda row: row["condition_gap"], -math.inf)
    return statistics.mean(by_row[max(by_row)]) if by_row else 0.0


def _by_raster_row(rows: list[Row], figure_of: Callable[[Row], float | None], floor: float) -> dict[float, list[float]]:
    """Return, by row of patches from 1, the mean over it for each seed."""
    found: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        value = figure_of(row)
        if value is not None:
            line = row["position"] // math.isqrt(row["tokens"]) + 1
            found.setdefault(line, {}).setdefault(row["seed"], []).append(value)
    return {
        line: [max(floor, statistics.mean(values)) for values in by_seed.values()]
        for line, by_seed in sorted(found.items())
    }


def draw_solver(figure: Figure, rows: list[Row]) -> None:
    """A colour for each solver, a style of line for each grid of times; distilled heads among them."""
    axes: Axes = figure.subplots()
    fids: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["evaluations"]):
        fids.setdefault((row["system"], row["solver"]), {}).setdefault(row["evaluations"], []).append(row["fid"])
    means = {key: {at: statistics.mean(each) for at, each in found.items()} for key, found in fids.items()}
    best = min(mean for found in means.values() for mean in found.values())
    above: list[str] = []
    for place, (key, found) in enumerate(fids.items()):
        solver, _, grid = key[1].partition(", ")
        colour, (style, marker) = SOLVERS.get(solver, "#444444"), GRIDS.get(grid, ("-", "x"))
        apart = 1 + DODGE * (place - (len(fids) - 1) / 2)
        at, heights = [apart * count for count in found], list(means[key].values())
        axes.plot(at, heights, style, marker=marker, color=colour, markersize=5, zorder=ON_TOP)
        several = [(x, min(each), max(each)) for x, each in zip(at, found.values(), strict=True) if len(each) > 1]
        if several:
            axes.vlines(*zip(*several, strict=True), color=colour, linewidth=1, alpha=0.6)
        above += [f"{key[1]} {mean:.1f} at {count}" for count, mean in means[key].items() if mean > WORST * best]
    label = "evaluations of the head per token"
    if any(len(each) > 1 for found in fids.values() for each in found.values()):
        label += " (marks: means over seeds, bars: from the least to the greatest)"
    axes.set(xlabel=label, xscale="log", ylabel="FID (lower is better)")
    axes.set(yscale="log", ylim=(0.9 * best, 1.05 * WORST * best))
    every = sorted({row["evaluations"] for row in rows})
    axes.set_xticks(every, [str(count) for count in every])
    logarithmic(axes)
    axes.grid(alpha=0.3)
    if above:
        axes.set_title(textwrap.fill(f"Above the upper edge, FID: {', '.join(above)} evaluations", 130), fontsize=9)
    _legend_of_solvers(figure, rows)


def _legend_of_solvers(figure: Figure, rows: list[Row]) -> None:
    from matplotlib.lines import Line2D

    solvers = {row["solver"].partition(", ")[0]: row["system"] for row in rows}
    grids = {row["solver"].partition(", ")[2] for row in rows}
    handles = [Line2D([], [], color="none", label="Solver")]
    for solver in sorted(solvers, key=lambda name: list(SOLVERS).index(name) if name in SOLVERS else len(SOLVERS)):
        own_head = "," in solvers[solver]
        label = f"{solver} ({name_of(solvers[solver])})" if own_head else solver
        handles.append(Line2D([], [], color=SOLVERS.get(solver, "#444444"), linewidth=3, label=label))
    handles += [Line2D([], [], color="none", label=""), Line2D([], [], color="none", label="Grid of times")]
    for grid in [*(name for name in GRIDS if name in grids), *sorted(grids - GRIDS.keys())]:
        style, marker = GRIDS.get(grid, ("-", "x"))
        handles.append(Line2D([], [], color="black", linestyle=style, marker=marker, label=grid or "uniform"))
    figure.legend(handles=handles, loc="outside right center", fontsize=9, handlelength=3.5)


def draw_pareto(figure: Figure, rows: list[Row]) -> None:
    """Plot FID over the time of each setting, means over the seeds; a line joins those that no other setting beats."""
    axes: Axes = figure.subplots()
    of = sorted((time, group.fid, str(group.value)) for group in groups(rows) if (time := group.mean("time_ratio")))
    front = [(time, fid) for place, (time, fid, _) in enumerate(of) if all(fid < other for _, other, _ in of[:place])]
    axes.plot(*zip(*front, strict=True) if front else ([], []), color=colour_of("pra"), linewidth=1.6)
    for time, fid, name in of:
        axes.plot([time], [fid], "o", color=colour_of("pra") if (time, fid) in front else colour_of(""), markersize=6)
        axes.annotate(name, (time, fid), xytext=(6, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="time per image over the default's (left: faster)", ylabel="FID (lower is better)")
    axes.margins(x=0.15)
    logarithmic(axes, "x")
    logarithmic(axes)
    axes.grid(alpha=0.3)
