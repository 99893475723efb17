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
from pra.evaluation.evaluate import Report
from pra.evaluation.report.content import Progress, evaluation, evaluations, progress
from pra.models.weights import newest_checkpoint
from pra.training.run import read_metrics, read_run
from pra.utils.paths import expand

FIGURES = "figures.json"
"""The evaluation that speaks for a run where its folder holds several."""


@dataclass(frozen=True)
class Run:
    """A run's folder, read; ``metrics`` are the lines of its ``metrics.jsonl``, at least one."""

    folder: Path
    config: RunConfig
    metrics: list[dict[str, float]]
    progress: Progress
    newest: Path | None
    """Its newest checkpoint."""


@dataclass(frozen=True)
class Column:
    """One argument: a run with the figures that were measured of it, if any, or an evaluation alone.

    ``file`` is where ``report`` was read; ``unread`` the names of the evaluations in a run's folder of which none could
    be chosen.
    """

    name: str
    run: Run | None
    file: Path | None
    report: Report | None
    unread: tuple[str, ...] = ()

    def known(self, *path: str) -> Any:
        """A value of the evaluation's provenance; None where it, or a part on the way, is not there."""
        value: Any = self.report and self.report.provenance
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def text(self, *path: str) -> str:
        """The same for a table."""
        value = self.known(*path)
        return "unknown" if value is None else str(value)


def read_columns(words: Sequence[str]) -> list[Column]:
    """The arguments of `pra compare`, ``[NAME=]PATH`` each. Without a name, that of the folder or file; the whole path
    where that would be another's too.

    Raises:
        PraError: fewer than two, one twice, two of the same name, one that is neither run nor evaluation, a run without
            metrics, or damaged files.
    """
    if len(words) < 2:
        raise PraError(f"nothing to compare {words[0]!r} with: give two or more" if words else "give two runs or more")
    named = [_parsed(word) for word in words]
    _check_different([path for _, path in named])
    short = Counter(name or _short(path) for name, path in named)
    names = [name or (_short(path) if short[_short(path)] == 1 else str(path)) for name, path in named]
    for name, count in Counter(names).items():
        if count > 1:
            raise PraError(f"{count} arguments are called {name!r}; give each a name of its own, NAME=PATH")
    return [_read(name, path) for name, (_, path) in zip(names, named, strict=True)]


def _parsed(word: str) -> tuple[str | None, Path]:
    """Name and path. Both may hold ``=``: what is there decides."""
    if os.path.exists(expand(word)):
        return None, expand(word)
    name, equals, text = word.partition("=")
    for place in (place for place, letter in enumerate(word) if letter == "=" and place):
        if os.path.exists(expand(word[place + 1 :])):
            return word[:place], expand(word[place + 1 :])
    raise PraError(
        f"nothing lies at {text if name and equals else word}: give the folder of a run, or a JSON that "
        "`pra eval --out` wrote, as PATH or NAME=PATH"
    )


def _short(path: Path) -> str:
    return path.resolve().name


def _check_different(paths: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in seen:
            same = "" if seen[path.resolve()] == path else f", as {seen[path.resolve()]} too"
            raise PraError(f"{path} is given twice{same}: leave one out")
        seen[path.resolve()] = path


def _read(name: str, path: Path) -> Column:
    if path.is_dir():
        run = _run(path)
        found = evaluations(path)
        chosen = next(iter(found)) if len(found) == 1 else path / FIGURES
        if chosen in found:
            return Column(name, run, chosen, found[chosen])
        return Column(name, run, None, None, tuple(file.name for file in found))
    try:
        report = evaluation(path)
    except PraError as error:
        raise PraError(f"{error}; give the folder of a run, or a JSON that `pra eval --out` wrote") from None
    if report is None:
        raise PraError(f"{path} holds no figures: give a JSON that `pra eval --out` wrote, or the folder of a run")
    return Column(name, None, path, report)


def _run(folder: Path) -> Run:
    config = read_run(folder)
    rows, come = read_metrics(folder), progress(folder, config)
    if come is None:
        raise PraError(
            f"the run {folder} has no metrics.jsonl yet, or nothing in it: it gets a line every "
            f"{config.train.log_every} steps (train.log_every)"
        )
    return Run(folder, config, rows, come, newest_checkpoint(folder))
