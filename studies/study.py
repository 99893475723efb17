"""One study from its cells to its table and plots."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pra.config import override
from pra.data import open_source
from pra.utils.files import write_atomically
from studies.catalogue import STUDIES, Cell, Study
from studies.groups import groups
from studies.measures import Judge, Row
from studies.pictures import draw_samples
from studies.records import Records
from studies.report import samples_name, write_report
from studies.run import Job, Workplace, run_jobs
from studies.settings import Scale, Setting
from studies.times import add_times

PICTURED = ("systems", "systems-plus", "length", "token-dimension")
"""Studies that compare systems, whose samples a reader wants to see."""
JUDGES = "judges"
"""The folder beside the studies' own that holds the classifiers."""


def run_study(
    study: Study,
    settings: Sequence[Setting],
    scale: Scale,
    seeds: Sequence[int],
    out: Path,
    place: Workplace,
    progress: bool = True,
) -> tuple[list[Path], int]:
    """Trains and measures what is missing, then writes table and plots.

    Args:
        study: the study.
        settings: the data to run it on.
        scale: size and length of the runs.
        seeds: one run of every cell for each seed.
        out: the folder of all studies; this one's is ``out / study.name``.
        place: where runs lie, and the device.
        progress: whether to show bars.

    Returns:
        The study's files (CSV, Markdown, plots), and the number of runs with missing work.

    Raises:
        PraError: data that are not there, a disk that refuses, or files that are not a study's.
        Interrupted: a signal came; runs are saved.
    """
    records = Records(out, study.name)
    jobs, judges = [], []
    for setting in map(with_classes, settings):
        judge = Judge.prepare(setting, out / JUDGES, place.runs / "references", place.device, progress)
        jobs += [_job(cell, seed, setting, scale, judge) for seed in seeds for cell in study.cells(setting, scale)]
        judges.append(judge)
    try:
        missing = run_jobs(jobs, records, place, progress)
        if study.name == "pareto":
            _add_times(study, judges, scale, seeds, records, place)
        shown = [records.path.parent / samples_name(judge.setting.name, scale.name) for judge in judges]
        for judge, path in zip(judges, shown, strict=True):
            if study.name in PICTURED and (missing or not path.exists()):
                _write_samples(path, study, judge, scale, records.rows, place)
    finally:
        files = write_report(study, records.rows, out / study.name) if records.rows else []
    return [records.path, *files, *(path for path in shown if path.exists())], missing


def _add_times(
    study: Study, judges: Sequence[Judge], scale: Scale, seeds: Sequence[int], records: Records, place: Workplace
) -> None:
    """Time all settings of a study that have rows, also if this session has judged only some of them."""
    every = STUDIES.get(study.name, study)
    for judge, seed in itertools.product(judges, seeds):
        cells = every.cells(judge.setting, scale)
        add_times([_job(cell, seed, judge.setting, scale, judge) for cell in cells], records, place)


def _write_samples(path: Path, study: Study, judge: Judge, scale: Scale, rows: list[Row], place: Workplace) -> None:
    """Samples of all systems of a study that compares them, by the existing runs of its first seed."""
    setting = judge.setting
    rows = [row for row in rows if (row["setting"], row["scale"]) == (setting.name, scale.name)]
    first = min(row["seed"] for row in rows)
    every = STUDIES.get(study.name, study)  # this one may be only some of its systems
    jobs = [_job(cell, first, setting, scale, judge) for cell in every.cells(setting, scale)]
    figure = draw_samples(jobs, groups(rows), place)
    if figure is not None:
        write_atomically(path, lambda file: figure.savefig(file, format="jpg", dpi=100, pil_kwargs={"quality": 92}))


def with_classes(setting: Setting) -> Setting:
    """A setting with the classes that its source really has: fonts differ in their emoji."""
    return replace(setting, num_classes=len(open_source(setting.data.source).classes))


def _job(cell: Cell, seed: int, setting: Setting, scale: Scale, judge: Judge) -> Job:
    config = override(cell.config, "train.seed", json.dumps(seed))
    labels = {
        "dataset": setting.dataset,
        "setting": setting.name,
        "scale": scale.name,
        "tokens": setting.tokens,
        "system": cell.system,
        "value": cell.value,
        "seed": seed,
    }
    base = override(cell.base, "train.seed", json.dumps(seed)) if cell.base else None
    return Job(labels, config, cell.measures, judge, base)
