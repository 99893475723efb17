"""A study's rows as a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pra.studies.catalogue import PRA, Study
from pra.studies.groups import Group, groups
from pra.studies.measures import Row
from pra.studies.report_probe import draw_probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "pra": "#d62728",
    "states": "#ff7f0e",
    "reconstructed": "#bcbd22",
    "exact": "#e377c2",
    "teacher-forced": "#1f77b4",
    "x-prediction": "#17becf",
    "input-noise": "#9467bd",
    "input-noise-x": "#8c564b",
    "jit": "#7f7f7f",
}


def draw(study: Study, rows: list[Row]) -> Figure | None:
    """The plot of a study's rows in one setting, of one scale; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn: Callable[[Figure, list[Row]], None] = {
        "systems": _draw_systems,
        "token-dimension": _draw_systems,
        "noise": _draw_noise,
        "length": _draw_length,
        "ablation": _draw_ablation,
        "rollout-gap": _draw_gap,
        "solver": _draw_solver,
        "probe": lambda figure, rows: draw_probe(figure, rows, COLOURS),
    }[study.name]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    drawn(figure, rows)
    title = f"{study.name}: {rows[0]['setting']} ({rows[0]['tokens']} tokens), scale {rows[0]['scale']}"
    figure.suptitle(title, fontsize=11)
    return figure


def _bars(axes: Axes, names: Sequence[str], of: Sequence[Group]) -> None:
    """Each seed a dot, their mean a bar."""
    for place, group in enumerate(of):
        colour = COLOURS.get(group.system, "#444444")
        axes.barh(place, group.fid, color=colour, alpha=0.35)
        axes.plot(group.best, [place] * len(group.best), "o", color=colour, markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="FID at the best guidance (each dot a seed; lower is better)")
    axes.grid(axis="x", alpha=0.3)


def _logarithmic(axes: Axes) -> None:
    """FID upwards by its logarithm: a system that fails would press all others flat."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _draw_systems(figure: Figure, rows: list[Row]) -> None:
    left, right = figure.subplots(1, 2)
    of = sorted(groups(rows), key=lambda group: group.fid)
    _bars(left, [group.system for group in of], of)
    for group in of:
        means = [statistics.mean(fids) for fids in group.by_guidance.values()]
        colour = COLOURS.get(group.system)
        right.plot(list(group.by_guidance), means, "o-", color=colour, label=group.system, markersize=3)
    right.set(xlabel="guidance scale", ylabel="FID")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)


def _draw_noise(figure: Figure, rows: list[Row]) -> None:
    states, pixels = figure.subplots(1, 2, sharey=True)
    for system in dict.fromkeys(row["system"] for row in rows):
        of = sorted((group for group in groups(rows) if group.system == system), key=lambda group: float(group.value))
        axes, colour = states if system == PRA else pixels, COLOURS.get(system)
        at = [float(group.value) for group in of]
        axes.plot(at, [group.fid for group in of], "o-", color=colour, label=system)
        axes.fill_between(at, [min(g.best) for g in of], [max(g.best) for g in of], color=colour, alpha=0.15)
    states.set(xlabel="t_min of the states' perturbation (1: none)", ylabel="FID at the best guidance")
    _logarithmic(states)
    states.invert_xaxis()
    pixels.set(xlabel="standard deviation of the pixels' noise (0: none)")
    for axes in (states, pixels):
        axes.grid(alpha=0.3)
        axes.legend()


def _draw_length(figure: Figure, rows: list[Row]) -> None:
    """FID and accuracy of each system against its steps."""
    left, right = figure.subplots(1, 2)
    every = sorted({row["steps"] for row in rows})
    for system in dict.fromkeys(row["system"] for row in rows):
        of = sorted((group for group in groups(rows) if group.system == system), key=lambda group: int(group.value))
        at, colour = [int(group.value) for group in of], COLOURS.get(system)
        left.plot(at, [group.fid for group in of], "o-", color=colour, label=system)
        left.fill_between(at, [min(g.best) for g in of], [max(g.best) for g in of], color=colour, alpha=0.15)
        right.plot(at, [group.accuracy for group in of], "o-", color=colour, label=system)
    left.set(ylabel="FID at the best guidance")
    right.set(ylabel="accuracy at that guidance")
    for axes in (left, right):
        axes.set(xlabel="training steps", xscale="log")
        axes.set_xticks(every, [str(steps) for steps in every])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    _logarithmic(left)
    left.legend(fontsize=8)


def _draw_ablation(figure: Figure, rows: list[Row]) -> None:
    of = sorted(groups(rows), key=lambda group: group.fid)
    axes = figure.subplots()
    _bars(axes, [str(group.value) for group in of], of)
    reference = next((group for group in of if group.value == "PRA"), None)
    if reference:
        axes.axvline(reference.fid, color="black", linewidth=0.8, linestyle="--")


def _draw_gap(figure: Figure, rows: list[Row]) -> None:
    """Every position thin, the mean of each row of the raster thick: the first patches of a row know least."""
    panels = figure.subplots(1, 3)
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        columns = math.isqrt(own[0]["tokens"])
        curves = (
            _by_position(own, lambda row: row.get("input_gap")),
            _by_position(own, lambda row: row["condition_gap"]),
            _by_position(own, lambda row: row["rollout_loss"] / row["training_loss"]),
        )
        for axes, curve in zip(panels, curves, strict=True):
            colour = COLOURS.get(system)
            axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.6, alpha=0.4)
            rows_of_raster: dict[int, list[float]] = {}
            for position, value in curve.items():
                rows_of_raster.setdefault(position // columns, []).append(value)
            at = [(row + 0.5) * columns for row in rows_of_raster]
            means = [statistics.mean(values) for values in rows_of_raster.values()]
            axes.plot(at, means, "o-", color=colour, linewidth=2, markersize=3, label=system)
    titles = ("backbone inputs: sampling against training", "conditions: sampling against training",
              "flow loss on rollouts / in training")  # fmt: skip
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("raster position (thick: mean of a row)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("energy coefficient (0: the same distribution)")
    panels[1].legend(fontsize=8)
    panels[2].axhline(1.0, color="black", linewidth=0.8, linestyle="--")


def _by_position(rows: list[Row], figure: Callable[[Row], float | None]) -> dict[int, float]:
    """The mean over the seeds, where there is a figure."""
    found: dict[int, list[float]] = {}
    for row in rows:
        value = figure(row)
        if value is not None:
            found.setdefault(row["position"], []).append(value)
    return {position: statistics.mean(found[position]) for position in sorted(found)}


def _draw_solver(figure: Figure, rows: list[Row]) -> None:
    """One panel a system, of one scale; a colour for each solver, a line style for each grid."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    solvers = sorted({row["solver"].partition(", ")[0] for row in rows})
    grids = sorted({row["solver"].partition(", ")[2] for row in rows})  # the uniform one has no name
    panels = figure.subplots(1, len(systems), squeeze=False, sharex=True, sharey=True)[0]
    every = sorted({row["evaluations"] for row in rows})
    for axes, system in zip(panels, systems, strict=True):
        for name in dict.fromkeys(row["solver"] for row in rows if row["system"] == system):
            own = [row for row in rows if (row["system"], row["solver"]) == (system, name)]
            counts = sorted({row["evaluations"] for row in own})
            fids = [[row["fid"] for row in own if row["evaluations"] == count] for count in counts]
            solver, _, grid = name.partition(", ")
            colour, style = f"C{solvers.index(solver)}", ("-", ":", "--", "-.")[grids.index(grid) % 4]
            axes.plot(counts, [statistics.mean(f) for f in fids], "o", linestyle=style, color=colour, label=name)
            axes.fill_between(counts, [min(f) for f in fids], [max(f) for f in fids], color=colour, alpha=0.15)
        axes.set(title=system, xlabel="head evaluations per token", xscale="log")
        axes.set_xticks(every, [str(count) for count in every])
        _logarithmic(axes)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("FID")
