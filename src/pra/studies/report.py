"""A study's rows as a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from pra.images import write_atomically
from pra.studies.catalogue import STUDIES, Study
from pra.studies.groups import Group, groups
from pra.studies.measures import Row
from pra.studies.plots import draw
from pra.studies.report_probe import about_probe, probe_table
from pra.studies.settings import SCALES, SETTINGS


def write_report(study: Study, rows: list[Row], folder: Path) -> list[Path]:
    """``README.md`` with a table per setting, and a plot per setting where matplotlib is there.

    Args:
        study: whose rows these are.
        rows: of all settings and scales.
        folder: the study's.

    Returns:
        The files.
    """
    parts = [f"# Study: {study.name}", "", study.question, ""]
    written = []
    for scale, setting in dict.fromkeys((row["scale"], row["setting"]) for row in rows):
        chosen = [row for row in rows if (row["scale"], row["setting"]) == (scale, setting)]
        parts += [f"## {setting}, scale {scale}", "", _about(chosen), "", *_table(study, chosen), ""]
        figure = draw(study, chosen)
        if figure is not None:
            path = folder / f"{setting}-{scale}.png"
            write_atomically(path, lambda file, figure=figure: figure.savefig(file, format="png", dpi=110))
            written.append(path)
            parts += [f"![{study.name}, {setting}]({path.name})", ""]
        parts += [f"`{_command(study, chosen)}`", "", *_provenance(chosen), ""]
    readme = folder / "README.md"
    write_atomically(readme, lambda file: file.write("\n".join(parts).encode()))
    return [readme, *written]


def _about(rows: list[Row]) -> str:
    setting = SETTINGS.get(rows[0]["setting"])
    seeds = sorted({row["seed"] for row in rows})
    images = sorted({row["images"] for row in rows if "fid" in row})
    steps = sorted({row["steps"] for row in rows})
    size = f"{setting.image_size}x{setting.image_size}, " if setting else ""
    figures = (
        f"FID of {' or '.join(map(str, images))} samples by the features of a classifier fitted on the data set, "
        "against its training images"
    )
    return (
        f"{rows[0]['dataset']} {size}{rows[0]['tokens']} tokens; {' or '.join(map(str, steps))} steps; seeds "
        f"{', '.join(map(str, seeds))}; {figures if images else about_probe(rows)}; mean ± standard deviation over "
        "seeds."
    )


def _command(study: Study, rows: list[Row]) -> str:
    """That makes these rows, which may be those of several sittings; with ``--compile`` sooner."""
    setting, scale = rows[0]["setting"], rows[0]["scale"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    words = ["pra study", study.name, "--setting", setting, "--scale", scale]
    if setting in SETTINGS and scale in SCALES:
        whole = STUDIES.get(study.name, study)  # this one may be only some of its systems
        every = {cell.system for cell in whole.cells(SETTINGS[setting], SCALES[scale])}
        words += ["--systems", ",".join(systems)] if every - set(systems) else []
    return " ".join([*words, "--seeds", ",".join(str(seed) for seed in sorted({row["seed"] for row in rows}))])


def _provenance(rows: list[Row]) -> list[str]:
    runs = {row["run"]: row for row in rows}
    training = sum(row.get("train_seconds", 0.0) for row in runs.values())
    measured = {(row["run"], row["measured"]): row.get("sample_seconds", 0.0) for row in rows}
    lines = [
        f"- {len(runs)} runs, {training / 60:.0f} minutes of training and {sum(measured.values()) / 60:.0f} minutes of "
        "measuring, summed over the runs, of which as many stood side by side as there are cores"
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
