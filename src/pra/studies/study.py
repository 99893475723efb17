"""One study from its cells to its table and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pra.config import override
from pra.data import open_source
from pra.studies.catalogue import Cell, Study
from pra.studies.measures import Judge
from pra.studies.records import Records
from pra.studies.report import write_report
from pra.studies.run import Job, Workplace, run_jobs
from pra.studies.settings import Scale, Setting


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
        study: which.
        settings: the data to run it on.
        scale: how large.
        seeds: one run each of every cell.
        out: the folder of all studies; this one's is ``out / study.name``.
        place: where runs lie, and the device.
        progress: whether to show bars.

    Returns:
        The study's files (CSV, Markdown, plots), and the number of runs that something was still missing of.

    Raises:
        PraError: data that are not there, a disk that refuses, or files that are no study's.
        Interrupted: a signal came; runs are saved.
    """
    records = Records(out, study.name)
    jobs = []
    for setting in settings:
        setting = with_classes(setting)
        judge = Judge.prepare(setting, place.runs / "references", place.device, progress)
        jobs += [_job(cell, seed, setting, scale, judge) for seed in seeds for cell in study.cells(setting, scale)]
    try:
        missing = run_jobs(jobs, records, place, progress)
    finally:
        files = write_report(study, records.rows, out / study.name) if records.rows else []
    return [records.path, *files], missing


def with_classes(setting: Setting) -> Setting:
    """A setting with the classes that its source really has: a font may know more emoji than another."""
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
