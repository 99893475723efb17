"""A study's rows as a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pra.images import write_atomically
from pra.studies.catalogue import PRA, Study
from pra.studies.measures import Row
from pra.studies.report_probe import about_probe, draw_probe, probe_table
from pra.studies.settings import SETTINGS

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


@dataclass(frozen=True)
class Group:
    """A system (at one value, where the study varies one) over its seeds, at its best guidance.

    The best guidance is the one with the lowest mean FID over the seeds. ``spread`` is the standard deviation over
    the seeds, None for a single one.
    """

    system: str
    value: Any
    guidance: float
    fid: float
    spread: float | None
    accuracy: float | None
    seeds: int
    by_guidance: dict[float, list[float]]
    rows: list[Row]

    @property
    def best(self) -> list[float]:
        """FID of each seed at the best guidance."""
        return self.by_guidance[self.guidance]

    def mean(self, column: str) -> float | None:
        """Over the rows that have the column."""
        values = [row[column] for row in self.rows if isinstance(row.get(column), int | float)]
        return statistics.mean(values) if values else None


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows with an FID by system and value, in order of first appearance."""
    found: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        found.setdefault((row["system"], row.get("value", "")), []).append(row)
    made = []
    for (system, value), members in found.items():
        judged = [row for row in members if "fid" in row]
        if not judged:
            continue
        by_guidance: dict[float, list[Row]] = {}
        for row in judged:
            by_guidance.setdefault(row["guidance"], []).append(row)
        # A guidance that some seeds have not been judged at yet would win or lose by the seeds it has.
        most = max(len(members) for members in by_guidance.values())
        whole = {guidance: members for guidance, members in by_guidance.items() if len(members) == most}
        best = min(whole, key=lambda guidance: statistics.mean(row["fid"] for row in whole[guidance]))
        fids = [row["fid"] for row in whole[best]]
        right = [row["accuracy"] for row in whole[best] if "accuracy" in row]
        made.append(
            Group(
                system=system,
                value=value,
                guidance=best,
                fid=statistics.mean(fids),
                spread=statistics.stdev(fids) if len(fids) > 1 else None,
                accuracy=statistics.mean(right) if right else None,
                seeds=len(fids),
                by_guidance={at: [row["fid"] for row in whole[at]] for at in sorted(whole)},
                rows=members,
            )
        )
    return made


def write_report(study: Study, rows: list[Row], folder: Path, command: str) -> list[Path]:
    """``README.md`` with a table per setting, and a plot per setting where matplotlib is there.

    Args:
        study: whose rows these are.
        rows: of all settings and scales.
        folder: the study's.
        command: that made them.

    Returns:
        The files.
    """
    parts = [f"# Study: {study.name}", "", study.question, ""]
    written = []
    for scale, setting in dict.fromkeys((row["scale"], row["setting"]) for row in rows):
        chosen = [row for row in rows if (row["scale"], row["setting"]) == (scale, setting)]
        parts += [f"## {setting}, scale {scale}", "", _about(chosen), "", *_table(study, chosen), ""]
        figure = _figure(study, chosen)
        if figure is not None:
            path = folder / f"{setting}-{scale}.png"
            write_atomically(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=110))
            written.append(path)
            parts += [f"![{study.name}, {setting}]({path.name})", ""]
    parts += ["## Provenance", "", f"Command: `{command}`", "", *_provenance(rows), ""]
    readme = folder / "README.md"
    write_atomically(readme, lambda file: file.write("\n".join(parts).encode()))
    return [readme, *written]


def _about(rows: list[Row]) -> str:
    setting = SETTINGS.get(rows[0]["setting"])
    seeds = sorted({row["seed"] for row in rows})
    images = sorted({row["images"] for row in rows if "fid" in row})
    size = f"{setting.image_size}x{setting.image_size}, " if setting else ""
    figures = (
        f"FID of {' or '.join(map(str, images))} samples by the features of a classifier fitted on the data set, "
        "against its training images"
    )
    return (
        f"{rows[0]['dataset']} {size}{rows[0]['tokens']} tokens; {rows[0]['steps']} steps; seeds "
        f"{', '.join(map(str, seeds))}; {figures if images else about_probe(rows)}; mean ± standard deviation over "
        "seeds."
    )


def _provenance(rows: list[Row]) -> list[str]:
    runs = {row["run"]: row for row in rows}
    training = sum(row.get("train_seconds", 0.0) for row in runs.values())
    measured = {(row["run"], row["measured"]): row.get("sample_seconds", 0.0) for row in rows}
    lines = [
        f"- {len(runs)} runs, {training / 60:.0f} minutes of training and {sum(measured.values()) / 60:.0f} minutes of "
        "measuring, summed over the runs"
    ]
    for column in ("hardware", "commit"):
        lines.append(f"- {column}: {', '.join(sorted({str(row[column]) for row in rows if column in row}))}")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _fid(group: Group) -> str:
    return f"{group.fid:.3f}" + (f" ± {group.spread:.3f}" if group.spread is not None else "")


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


# --- tables --------------------------------------------------------------------------------------------------


def _table(study: Study, rows: list[Row]) -> list[str]:
    if study.name == "rollout-gap":
        return _gap_table(rows)
    if study.name == "solver":
        return _solver_table(rows)
    if study.name == "probe":
        return _markdown(*probe_table(rows))
    varied = any(row.get("value") not in (None, "") for row in rows)
    head = ["system", *(["value"] if varied else []), "FID", "guidance", "accuracy", "seeds"]
    head += ["reconstruction FID", "parameters"]
    lines = []
    for group in sorted(groups(rows), key=lambda group: group.fid):
        lines.append(
            [
                group.system,
                *([str(group.value)] if varied else []),
                _fid(group),
                f"{group.guidance:g}",
                _number(group.accuracy, ".3f"),
                str(group.seeds),
                _number(group.mean("reconstruction_fid"), ".3f"),
                f"{group.rows[0]['parameters']:,}",
            ]
        )
    return _markdown(head, lines)


def _gap_table(rows: list[Row]) -> list[str]:
    head = ["system", "input gap, last quarter", "condition gap, last quarter", "loss on rollouts / in training", "FID"]
    lines = []
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        late = [row for row in own if row["position"] >= 3 * row["tokens"] // 4]
        ratio = sum(row["rollout_loss"] for row in own) / sum(row["training_loss"] for row in own)
        cells = [statistics.mean(row[name] for row in late) for name in ("input_gap", "condition_gap")]
        fid = statistics.mean(row["fid"] for row in own)
        lines.append((ratio, [system, *(f"{cell:.4f}" for cell in cells), f"{ratio:.3f}", f"{fid:.3f}"]))
    return _markdown(head, [line for _, line in sorted(lines)])


def _solver_table(rows: list[Row]) -> list[str]:
    evaluations = sorted({row["evaluations"] for row in rows})
    lines = []
    for system, solver in dict.fromkeys((row["system"], row["solver"]) for row in rows):
        cells = []
        for count in evaluations:
            key = (system, solver, count)
            fids = [row["fid"] for row in rows if (row["system"], row["solver"], row["evaluations"]) == key]
            cells.append(f"{statistics.mean(fids):.3f}" if fids else "")
        lines.append([system, solver, *cells])
    return _markdown(["system", "solver", *(f"{count} evaluations" for count in evaluations)], lines)


# --- plots ---------------------------------------------------------------------------------------------------


def _figure(study: Study, rows: list[Row]) -> Figure | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    draw: Callable[[Figure, list[Row]], None] = {
        "systems": _draw_systems,
        "token-dimension": _draw_systems,
        "noise": _draw_noise,
        "ablation": _draw_ablation,
        "rollout-gap": _draw_gap,
        "solver": _draw_solver,
        "probe": lambda figure, rows: draw_probe(figure, rows, COLOURS),
    }[study.name]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    draw(figure, rows)
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
    states.invert_xaxis()
    pixels.set(xlabel="standard deviation of the pixels' noise (0: none)")
    for axes in (states, pixels):
        axes.grid(alpha=0.3)
        axes.legend()


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
    from matplotlib.ticker import LogLocator

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
        axes.set(title=system, xlabel="head evaluations per token", xscale="log", yscale="log")
        axes.set_xticks(every, [str(count) for count in every])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("FID")
