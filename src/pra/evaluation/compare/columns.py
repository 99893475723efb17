"""What is compared: runs and files of `pra eval`, each with a name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pra.config import RunConfig
from pra.errors import PraError
from pra.evaluation.comparable import known
from pra.evaluation.evaluate import Report
from pra.evaluation.report.content import Progress, evaluation, evaluations, progress
from pra.models.weights import newest_checkpoint
from pra.training.run import read_metrics, read_run
from pra.utils.paths import expand

FIGURES = "figures.json"
"""The evaluation of a run whose folder holds several."""
EITHER = "Give the folder of a run, or a JSON that `pra eval --out` wrote"


@dataclass(frozen=True)
class Run:
    """A run's folder, read; ``metrics`` are the lines of its ``metrics.jsonl``, at least one."""

    folder: Path
    config: RunConfig
    metrics: list[dict[str, float]]
    progress: Progress
    newest: Path | None


@dataclass(frozen=True)
class Column:
    """One argument: a run with the figures that were measured of it, if any, or an evaluation alone.

    ``unread`` are the names of several evaluations in a run's folder, of which none could be chosen.
    """

    name: str
    run: Run | None
    report: Report | None
    unread: tuple[str, ...] = ()

    def known(self, *path: str) -> Any:
        """Return a value of the evaluation's provenance; None where a part of the path is missing."""
        return known(self.report and self.report.provenance, *path)

    def text(self, *path: str) -> str:
        """Return the same for a table."""
        value = self.known(*path)
        return "unknown" if value is None else str(value)


def read_columns(words: Sequence[str]) -> list[Column]:
    """Read the arguments of `pra compare`, ``[NAME=]PATH`` each, by default named after the folder or file.

    Where two have the same name, it is the whole path. Refuse fewer than two, one given twice, two of one name, and
    what is neither an evaluation nor a run with metrics.
    """
    if len(words) < 2:
        raise PraError(f"pra compare: {len(words)} argument(s). Give two or more", "missing")
    named = [_parsed(word) for word in words]
    short = Counter(name or path.resolve().name for name, path in named)
    names = [name or (own if short[own := path.resolve().name] == 1 else str(path)) for name, path in named]
    (place, times), *_ = Counter(path.resolve() for _, path in named).most_common(1)
    if times > 1:
        raise PraError(f"{place} is given twice. Leave one out", "conflict", path=place)
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise PraError(f"{times} arguments are called {name!r}. Name them, NAME=PATH", "conflict", name=name)
    return [_read(name, path) for name, (_, path) in zip(names, named, strict=True)]


def _parsed(word: str) -> tuple[str | None, Path]:
    """Split name and path. Both may hold ``=``: what is there decides."""
    if os.path.exists(expand(word)):
        return None, expand(word)
    for place in (place for place, letter in enumerate(word) if letter == "=" and place):
        if os.path.exists(expand(word[place + 1 :])):
            return word[:place], expand(word[place + 1 :])
    raise PraError(f"nothing lies at {word}. {EITHER}, as PATH or NAME=PATH", "missing", path=word)


def _read(name: str, path: Path) -> Column:
    if path.is_dir():
        run, found = _run(path), evaluations(path)
        chosen = next(iter(found)) if len(found) == 1 else path / FIGURES
        return Column(name, run, found.get(chosen), () if chosen in found else tuple(file.name for file in found))
    report = evaluation(path)
    if report is None:
        raise PraError(f"{path} holds no figures. {EITHER}", "unreadable", path=path)
    return Column(name, None, report)


def _run(folder: Path) -> Run:
    config = read_run(folder)
    rows, come = read_metrics(folder), progress(folder, config)
    if come is None:
        problem = f"the run {folder} has no line in metrics.jsonl yet"
        raise PraError(f"{problem}. Wait for {config.train.log_every} steps (train.log_every)", "missing", path=folder)
    return Run(folder, config, rows, come, newest_checkpoint(folder))
