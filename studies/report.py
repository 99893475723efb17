"""A study's rows as a page of tables and plots."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pra.utils.files import write_atomically
from studies.catalogue import REAL, STUDIES, Study
from studies.measures import KEPT_FEATURES, Row
from studies.names import described, in_ranges
from studies.plots import draw, draw_tokens
from studies.report_probe import about_probe
from studies.settings import SCALES, SETTINGS
from studies.tables import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SAMPLES = (
    "Samples of the same classes and seeds: a run of each system, at its best guidance, nothing chosen by hand. The "
    "FID beside them is the mean over the seeds."
)


def samples_name(setting: str, scale: str) -> str:
    """The picture of samples beside a study's table (:mod:`studies.pictures`)."""
    return f"{setting}-{scale}-samples.jpg"


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
    if study.name == "token-dimension":
        for scale in dict.fromkeys(row["scale"] for row in rows):
            figure = draw_tokens(study, [row for row in rows if row["scale"] == scale])
            if figure is not None:
                written.append(_save(figure, folder / f"tokens-{scale}.png"))
                parts += [f"![FID over JiT's by the size of a token, scale {scale}]({written[-1].name})", ""]
    for scale, setting in dict.fromkeys((row["scale"], row["setting"]) for row in rows):
        there = [row for row in rows if (row["scale"], row["setting"]) == (scale, setting)]
        chosen = [row for row in there if row["system"] != REAL]
        parts += [f"## {setting}, scale {scale}", "", _about(study, chosen), "", *tables(study, chosen), ""]
        parts += _real(row for row in there if row["system"] == REAL)
        figure = draw(study, with_shorter(study, rows, chosen))
        if figure is not None:
            written.append(_save(figure, folder / f"{setting}-{scale}.png"))
            parts += [f"![{study.name}, {setting}]({written[-1].name})", ""]
        if (samples := folder / samples_name(setting, scale)).exists():
            parts += [f"![Samples of the systems, {setting}]({samples.name})", "", SAMPLES, ""]
        parts += [*commands(study, there), "", *_provenance(chosen), ""]
    readme = folder / "README.md"
    write_atomically(readme, lambda file: file.write("\n".join(parts).encode()))
    return [readme, *written]


def _real(rows: Iterable[Row]) -> list[str]:
    """The figures of held-out images, which are the same for every seed."""
    row = next(iter(rows), None)
    if row is None:
        return []
    figures = f"FID {row['fid']:.3f}, accuracy {row['accuracy']:.3f}, precision {row['precision']:.3f}"
    beside = "Do not expect a model that copies no training image far below that; so few images raise an FID a little."
    return [f"The {row['images']} real images that no run learnt from: {figures}. {beside}", ""]


def with_shorter(study: Study, rows: list[Row], chosen: list[Row]) -> list[Row]:
    """Return the rows to draw for a setting: in the study `length` also the shorter trainings."""
    setting = SETTINGS.get(chosen[0]["setting"])
    if study.name != "length" or setting is None:
        return chosen
    where = (setting.lengthens, chosen[0]["scale"])
    shorter = [row for row in rows if (row["setting"], row["scale"]) == where]
    there = {row["run"] for row in shorter}
    return [*shorter, *(row for row in chosen if row["run"] not in there)]


def _save(figure: Figure, path: Path) -> Path:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    return path


def _about(study: Study, rows: list[Row]) -> str:
    images = sorted({row["images"] for row in rows if "fid" in row})
    figures = "FID is"
    if study.name not in ("rollout-gap", "solver", "pareto"):
        figures = "accuracy is how often that sees the class that was asked for; FID, KID, precision and recall are"
    judged = (
        f"{' or '.join(map(str, images))} samples of each run are judged by the features of a classifier fitted on the "
        f"data set's training images; {figures} against these images, the last three against {KEPT_FEATURES} of them"
    )
    return (
        f"{described(rows)}; seeds {in_ranges(row['seed'] for row in rows)}. "
        f"{judged if images else about_probe(rows)}. "
        "± is the sample standard deviation (n - 1) over training seeds."
    )


def commands(study: Study, rows: list[Row]) -> list[str]:
    """Return the commands that make these rows, and a note on what else they make.

    Systems, or values of the studies `recipe` and `pareto`, with other seeds have their own line. ``--compile`` is
    faster.
    """
    setting, scale = rows[0]["setting"], rows[0]["scale"]
    by_value = study.name in ("recipe", "pareto")
    column, option, separator = ("value", "--values", "|") if by_value else ("system", "--systems", ",")
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row[column], set()).add(row["seed"])
    nameable = not any(separator in name for name in seeds)  # the option takes such a name apart
    if not nameable:
        seeds = {name: {row["seed"] for row in rows} for name in seeds}
    alike: dict[frozenset[int], list[str]] = {}
    for name, own in seeds.items():
        alike.setdefault(frozenset(own), []).append(name)
    cells: list[tuple[str, Any]] = []
    if setting in SETTINGS and scale in SCALES:
        whole = STUDIES.get(study.name, study)  # this one may be only some of its systems
        cells = [(cell.system, cell.value) for cell in whole.cells(SETTINGS[setting], SCALES[scale])]
    named = {cell: cell[column == "value"] for cell in cells}
    some = nameable and (len(alike) > 1 or bool(set(named.values()) - set(seeds)))
    lines = []
    for numbers, names in alike.items():
        words = ["python", "-m", "studies", study.name, "--setting", setting, "--scale", scale]
        words += [option, separator.join(names)] if some else []
        lines.append(shlex.join([*words, "--seeds", in_ranges(numbers)]))
    asked = {(system, value, seed) for (system, value), name in named.items() for seed in seeds.get(name, ())}
    beyond = len(asked - {(row["system"], row.get("value", ""), row["seed"]) for row in rows})
    note = f"This makes {beyond} more than the table has so far, counted by system, value and seed."
    return ["```sh", *lines, "```", *(["", note] if beyond else [])]


def _provenance(rows: list[Row]) -> list[str]:
    runs = {row["run"]: row for row in rows}
    training = sum(row.get("train_seconds", 0.0) for row in runs.values())
    measured = {(row["run"], row["measured"]): row.get("sample_seconds", 0.0) for row in rows}
    lines = [
        f"- {len(runs)} runs, {training / 60:.0f} minutes of training and {sum(measured.values()) / 60:.0f} minutes of "
        "measuring, summed over the runs, of which as many stood side by side as there are cores"
    ]
    if of := {str(row.get("judge", "not recorded")) for row in rows if "fid" in row}:
        apart = ": two judges differ by some per cent over the same pictures (docs/evidence.md)" if len(of) > 1 else ""
        lines.append(f"- judge: {'; '.join(sorted(of))}{apart}")
    for column in ("hardware", "commit"):
        lines.append(f"- {column}: {'; '.join(sorted({str(row[column]) for row in rows if column in row}))}")
    return lines
