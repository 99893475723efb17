"""Plots of the studies `rollout-gap`, `solver` and `pareto`."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from studies.groups import groups
from studies.measures import Row
from studies.names import colour_of, name_of
from studies.plot_parts import ON_TOP, banded, legend_below, logarithmic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR = 1e-4
"""Smallest gap drawn: estimates from a thousand samples cannot tell smaller gaps from zero."""

SOLVERS = {
    "midpoint": ("#1b9e77", "o"),
    "adams-bashforth": ("#d95f02", "s"),
    "dpm": ("#7570b3", "D"),
    "heun": ("#666666", "X"),
    "euler": ("#66a61e", "^"),
    "euler-maruyama": ("#e6ab02", "v"),
    "shortcut": ("#e7298a", "*"),
}
"""Colour and marker of each solver; other colours than those of the systems."""

GRIDS = ("", "cosine", "logit-normal", "learnt")
"""Grids of times, a panel each."""
WORST = 6.0
"""Upper edge of a plot of solvers, as a multiple of the best FID; higher points are named at the edge."""


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
        "conditions\n(outputs of the backbone)",
        "inputs of the backbone",
        "flow loss on the model's rollouts\ndivided by that in training",
    )
    panels[2].axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    count = math.isqrt(rows[0]["tokens"])
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(1, count + 1))
        axes.set_xlabel("row of patches, from the top")
        logarithmic(axes)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gap between sampling and training")
    note = (
        "Gap: energy coefficient. 0: distributed in sampling as in training; 1: as far apart as possible.\n"
        f"Gaps below {FLOOR:g} are drawn at {FLOOR:g}. A loss of 1 is as in training.\n"
        "Line: mean over seeds and a row of patches; band: from the least to the greatest seed."
    )
    legend_below(figure, panels[0], [name_of(system) for system in systems], note)


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
    """Plot FID by evaluations of the head: a panel for each grid of times, a curve for each solver."""
    named = [(*row["solver"].partition(", ")[::2], row) for row in rows]
    grids = sorted({grid for _, grid, _ in named}, key=lambda grid: (*GRIDS, grid).index(grid))
    order = sorted({solver for solver, _, _ in named}, key=lambda solver: (*SOLVERS, solver).index(solver))
    shape = {"width_ratios": [2 if grid == "" else 1 for grid in grids]}
    panels = dict(
        zip(grids, figure.subplots(1, len(grids), sharey=True, squeeze=False, gridspec_kw=shape)[0], strict=True)
    )
    means: dict[tuple[str, str, int], float] = {}
    for grid, solver in itertools.product(grids, order):
        own = [row for name, times, row in named if (name, times) == (solver, grid)]
        fids = {at: [row["fid"] for row in own if row["evaluations"] == at] for at in _counts(own)}
        means |= {(solver, grid, at): statistics.mean(values) for at, values in fids.items()}
        if own:
            colour, marker = SOLVERS.get(solver, ("#444444", "x"))
            heights = [means[solver, grid, at] for at in fids]
            label = f"{solver} ({name_of(own[0]['system'])})" if "," in own[0]["system"] else solver
            panels[grid].plot(list(fids), heights, marker=marker, color=colour, label=label, zorder=ON_TOP)
            panels[grid].vlines(list(fids), *_ends(fids.values()), color=colour, linewidth=1, alpha=0.6)
    best = min(means.values())
    for grid, axes in panels.items():
        axes.set_title(f"{grid or 'uniform'} times", fontsize=10)
        axes.set(xlabel="NFE", xscale="log", ylim=(0.9 * best, 1.05 * WORST * best))
        counts = _counts(row for _, times, row in named if times == grid)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.margins(x=0.15)
        logarithmic(axes)
        axes.grid(alpha=0.3)
    panels[grids[0]].set_ylabel("FID (lower is better)")
    note = "NFE: evaluations of the head per token; mark: mean over seeds; bar: from the least to the greatest"
    above = [
        f"{' '.join(filter(None, key[:2]))} {mean:.1f} at {key[2]}"
        for key, mean in means.items()
        if mean > WORST * best
    ]
    if above:
        note += "\n" + textwrap.fill(f"Above the upper edge, FID: {', '.join(above)} evaluations", 110)
    legend_below(figure, list(panels.values()), note=note)


def _counts(rows: Iterable[Row]) -> list[int]:
    return sorted({row["evaluations"] for row in rows})


def _ends(values: Iterable[list[float]]) -> tuple[list[float], list[float]]:
    """Return the least and the greatest of each list."""
    return [min(each) for each in values], [max(each) for each in values]


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
