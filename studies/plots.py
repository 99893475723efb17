"""Plots of a study's rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pra.errors import counted
from studies.catalogue import PRA, Study
from studies.groups import Group, groups
from studies.measures import Row
from studies.names import colour_of, described, look_of, name_of
from studies.pairs import Paired, paired, unchanged
from studies.plot_parts import banded, curve, legend_below, logarithmic, ranking, room_beside
from studies.plots_sampling import draw_gap, draw_pareto, draw_solver
from studies.report_probe import draw_probe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST = "FID at the best guidance scale"
DOTS = "mark: a seed, hollow if it is the only one\nline: mean over seeds"
SIZE = (9, 5)
"""Width and height of a figure in inches: a page of the documentation shows it 700 pixels wide."""
WITHOUT = {PRA: "reconstructed", "input-noise": "teacher-forced", "input-noise-x": "x-prediction"}
"""Systems without a perturbation, by the systems that perturb their inputs."""
NONE = (1.0, 0.0)
"""Strengths that mean no perturbation: ``t_min`` of states, and standard deviation of noise on pixels."""
DODGE = 0.03
"""Shift between curves of neighbouring systems, as a fraction of x, so that their dots do not overlap."""


def draw(study: Study, rows: list[Row]) -> Figure | None:
    """Plot a study's rows of one setting and scale; return `None` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn: Callable[[Figure, list[Row]], None] = {
        "systems": _draw_systems,
        "systems-plus": _draw_systems,
        "token-dimension": _draw_systems,
        "noise": _draw_noise,
        "length": _draw_length,
        "ablation": _draw_ablation,
        "recipe": _draw_ablation,
        "rollout-gap": draw_gap,
        "solver": draw_solver,
        "pareto": draw_pareto,
        "probe": draw_probe,
    }[study.name]
    figure = Figure(figsize=SIZE, layout="constrained")
    drawn(figure, rows)
    _title(figure, study, described(rows), rows)
    return figure


def _draw_systems(figure: Figure, rows: list[Row]) -> None:
    """Plot each system's best FID on the left, and its FID by guidance scale on the right."""
    left, right = figure.subplots(1, 2)
    of = sorted(groups(rows), key=lambda group: group.fid)
    ranking(left, [name_of(g.system) for g in of], [look_of(g.system) for g in of], [g.best for g in of])
    room_beside(left, [group.best for group in of], log=True)
    left.set(xlabel=f"{BEST} (lower is better)\nmark: a seed; stroke: mean over seeds")
    for group in of:
        banded(right, group.by_guidance, group.system)
    right.set(xlabel="guidance scale (1: no guidance)\nline: mean over seeds; band: least to greatest", ylabel="FID")
    right.set_title("colours and marks as on the left", fontsize=9)
    right.set_xticks(sorted({guidance for group in of for guidance in group.by_guidance}))
    right.set_xticklabels([f"{tick:g}" for tick in right.get_xticks()])
    right.grid(alpha=0.3)
    logarithmic(left, "x")
    logarithmic(right)


def _draw_noise(figure: Figure, rows: list[Row]) -> None:
    """Plot FID by the strength of PRA's perturbation on the left, and of noise on pixels on the right, on one scale."""
    of = [group for group in groups(rows) if isinstance(group.value, int | float)]
    own = [group for group in of if group.system == PRA]
    systems = [system for system in dict.fromkeys(group.system for group in of) if system != PRA]
    panels = figure.subplots(1, 2 if systems else 1, sharey=True, squeeze=False)[0]
    states, pixels = panels[0], panels[-1]
    for axes, system in [(states, PRA), *((pixels, system) for system in systems)]:
        strengths = _by_value([group for group in of if group.system == system])
        if strengths:
            apart = 0.0 if system == PRA else 0.01 * (systems.index(system) - (len(systems) - 1) / 2)
            curve(axes, {at + apart: values for at, values in strengths.items()}, system)
        none, same = NONE[system != PRA], WITHOUT.get(system, system)
        if none in strengths:
            mean = statistics.mean(strengths[none])
            axes.axhline(mean, color=colour_of(same), linestyle=":", label=name_of(same))
    if systems:
        pixels.set_xlabel("standard deviation of the noise\non pixels in [-1, 1] (0: none)")
        pixels.set_title("noise on pixels", fontsize=10)
    if systems and own:
        # Do not draw one lucky seed beside the mean of three.
        most = max(group.seeds for group in own)
        best = min((group for group in own if group.seeds == most), key=lambda group: group.fid)
        pixels.axhline(best.fid, color=colour_of(PRA), linestyle="--")
        beside = {"xytext": (-4, 4), "textcoords": "offset points", "ha": "right", "fontsize": 9}
        where, place = ("axes fraction", "data"), (1.0, best.fid)
        pixels.annotate(f"PRA's best, t_min = {best.value:g}", place, xycoords=where, color=colour_of(PRA), **beside)
    states.set(xlabel=f"t_min of PRA's perturbation (1: none; 0: strongest)\n{DOTS}", ylabel=BEST)
    states.set_title("perturbed states, decoded to pixels", fontsize=10)
    states.invert_xaxis()
    logarithmic(states)
    for axes in panels:
        axes.grid(alpha=0.3)
    legend_below(figure, list(panels))


def _by_value(of: Sequence[Group]) -> dict[float, list[float]]:
    return {float(group.value): group.best for group in sorted(of, key=lambda group: float(group.value))}


def _draw_length(figure: Figure, rows: list[Row]) -> None:
    """Plot each system's FID at its best guidance, and its accuracy at one guidance, by training steps."""
    left, right = figure.subplots(1, 2)
    of = [group for group in groups(rows) if isinstance(group.value, int | float)]
    every = sorted({int(group.value) for group in of})
    guidance = _one_guidance(of)
    systems = sorted({group.system for group in of}, key=lambda system: _last(of, system))
    for place, system in enumerate(systems):
        own = sorted((group for group in of if group.system == system), key=lambda group: int(group.value))
        apart = 1 + DODGE * (place - (len(systems) - 1) / 2)
        curve(left, {group.value * apart: group.best for group in own}, system)
        right_of = {group.value * apart: [row["accuracy"] for row in group.at(guidance) if "accuracy" in row]
                    for group in own}  # fmt: skip
        curve(right, {at: values for at, values in right_of.items() if values}, system)
    left.set(ylabel=f"{BEST} \n(lower is better)")
    right.set(ylabel=f"accuracy at guidance scale {guidance:g}\n(higher is better)")
    for axes in (left, right):
        axes.set(xlabel=f"training steps\n{DOTS}", xscale="log")
        axes.set_xticks(every, [str(steps) for steps in every])
        axes.minorticks_off()
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    logarithmic(left)
    legend_below(figure, left, [name_of(system) for system in systems])


def _last(of: Sequence[Group], system: str) -> float:
    """Return the FID of a system's longest training."""
    return max((group for group in of if group.system == system), key=lambda group: int(group.value)).fid


def _one_guidance(of: Sequence[Group]) -> float:
    """Return the best guidance of PRA's shortest training, or of any system's if PRA is not among the groups."""
    own = [group for group in of if group.system == PRA] or list(of)
    return min(own, key=lambda group: int(group.value)).guidance


def _draw_ablation(figure: Figure, rows: list[Row]) -> None:
    """Plot each variant's FID minus PRA's on the same seeds."""
    axes: Axes = figure.subplots()
    of = groups(rows)
    reference = unchanged(of)
    beside = [] if reference is None else paired(of, reference)
    shown = sorted((pair for pair in beside if pair.differences), key=lambda pair: pair.mean)
    if reference is None or not shown:
        of = sorted(of, key=lambda group: group.fid)
        ranking(axes, [str(g.value) for g in of], [look_of(g.system) for g in of], [g.best for g in of])
        axes.set(xlabel=f"{BEST} (mark: a seed; stroke: mean over seeds)")
        return
    values = [list(pair.differences.values()) for pair in shown]
    ranking(axes, [_with_seeds(pair) for pair in shown], [look_of("")] * len(shown), values, "+z.2f")
    room_beside(axes, [*values, [0.0]])
    label = f"PRA, FID {reference.fid:.2f}"
    axes.axvline(0, color=colour_of(PRA), linewidth=1.5, label=label)
    if reference.spread is not None:
        label = f"± standard deviation of PRA's own {reference.seeds} seeds"
        axes.axvspan(-reference.spread, reference.spread, color=colour_of(PRA), alpha=0.12, linewidth=0, label=label)
    axes.set(xlabel="FID minus PRA's on the same seed, each at its best guidance scale\n(right: worse than PRA)")
    axes.legend(loc="upper right", fontsize=9)


def _with_seeds(pair: Paired) -> str:
    return f"{pair.group.value}  ({counted(len(pair.differences), 'seed')})"


def draw_tokens(study: Study, rows: list[Row]) -> Figure | None:
    """Plot the study `token-dimension` over its settings at one scale, each FID divided by JiT's mean in its setting.

    Divide, since settings have different judges, whose FIDs do not compare. Return `None` without matplotlib, or
    without JiT in two settings.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    sizes: dict[float, dict[str, list[float]]] = {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = {group.system: group for group in groups(row for row in rows if row["setting"] == setting)}
        if "jit" in of and isinstance(of["jit"].value, int | float):
            sizes[of["jit"].value] = {name: [fid / of["jit"].fid for fid in g.best] for name, g in of.items()}
    if len(sizes) < 2:
        return None
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    systems = list(dict.fromkeys(system for size in sorted(sizes, reverse=True) for system in sizes[size]))
    largest = sizes[max(sizes)]
    systems.sort(key=lambda system: -statistics.mean(largest.get(system, [0.0])))
    for place, system in enumerate(systems):
        apart = 1 + DODGE * (place - (len(systems) - 1) / 2)
        curve(axes, {size * apart: of[system] for size, of in sorted(sizes.items()) if system in of}, system)
    axes.set(xscale="log", xlabel=f"token dimension (numbers in a patch)\n{DOTS}")
    axes.set_xticks(sorted(sizes), [f"{size:g}" for size in sorted(sizes)])
    axes.margins(x=0.15)
    logarithmic(axes)
    axes.set(ylabel="FID divided by JiT's at the same token size\n(above 1: worse than JiT)")
    axes.grid(alpha=0.3)
    legend_below(figure, axes, [name_of(system) for system in systems])
    _title(figure, study, rows[0]["dataset"], rows)
    return figure


def _title(figure: Figure, study: Study, data: str, rows: list[Row]) -> None:
    """Write the study's question, its data, and whose FID it is: not that of Inception features."""
    judge = "" if study.name in ("rollout-gap", "probe") else "; FID with features of the study's own classifier"
    question = study.question.replace("`", "")
    figure.suptitle(f"{question}\n{data}, scale {rows[0]['scale']}{judge}", fontsize=10)
