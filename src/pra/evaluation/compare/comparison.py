"""The table of `pra compare`: settings that differ, how far each came, and what was measured."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pra.config import RunConfig, to_dict
from pra.errors import PraError
from pra.evaluation.comparable import PREFIX, differing, known, shown
from pra.evaluation.compare.table import Row, Section, one_line, rendered
from pra.evaluation.evaluate import Figures, Report
from pra.evaluation.report.charts import thinned
from pra.evaluation.report.content import Progress, cell, evaluation, evaluations, progress
from pra.models import count_parameters
from pra.models.weights import newest_checkpoint
from pra.training.plots import OTHERS, curves
from pra.training.run import VALIDATION, loss_terms, points_of, read_metrics, read_run
from pra.utils.extras import import_failed
from pra.utils.files import expand

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


NOTHING = "-"
HIGHEST = 3
"""An axis ends at this multiple of the first run's highest value: a loss that explodes would hide the others."""
MANY = f"{{}} are all evaluations of it, and none is called {FIGURES}: give the file that is meant"


def compared(columns: Sequence[Column]) -> str:
    """Return all that is known of the columns, as text for a terminal."""
    sections, notes = _evaluations(columns)
    table = rendered([column.name for column in columns], [*_settings(columns), *_training(columns), *sections])
    return "\n".join([table, *map(one_line, notes)])


def _flattened(values: Any, path: str = "") -> dict[str, str]:
    """Return ``{"train.optimizer.lr": "0.001", ...}``: settings by the names that ``--set`` takes."""
    if not isinstance(values, dict):
        return {path: values if isinstance(values, str) else json.dumps(values)}
    parts = [_flattened(value, f"{path}.{name}" if path else name) for name, value in values.items()]
    return {name: text for part in parts for name, text in part.items()}


def _different(settings: Sequence[dict[str, str] | None]) -> list[Row]:
    """Return a row per setting in which the known ones differ."""
    known = [values for values in settings if values is not None]
    names = dict.fromkeys(itertools.chain.from_iterable(known))
    different = [name for name in names if len({values.get(name, NOTHING) for values in known}) > 1]
    return [Row(name, [(values or {}).get(name, NOTHING) for values in settings]) for name in different]


def _settings(columns: Sequence[Column]) -> list[Section]:
    settings = [_flattened(to_dict(c.run.config) | {"targets": None}) if c.run else None for c in columns]
    if sum(values is not None for values in settings) < 2:
        return []
    rows = _different(settings)
    return [Section("settings that differ", rows) if rows else Section("settings: the same")]


def _training(columns: Sequence[Column]) -> list[Section]:
    if not any(column.run for column in columns):
        return []

    def row(name: str, of: Callable[[Run], str]) -> Row:
        return Row(name, [of(column.run) if column.run else NOTHING for column in columns])

    come = [
        row("parameters", lambda run: f"{sum(count_parameters(run.config.model).values()) / 1e6:.3f} M"),
        row("steps", lambda run: f"{run.progress.steps:,} of {run.config.train.steps:,}"),
        row("images seen", lambda run: f"{run.progress.images:,}"),
        row("seconds of training", lambda run: f"{run.progress.seconds:,.0f}"),
        row("images / s", lambda run: f"{run.progress.images_per_second:.3g}"),
    ]
    terms = loss_terms(line for column in columns if column.run for line in column.run.metrics)
    names = [*terms, *(VALIDATION + name for name in terms)]
    losses = [row(name, lambda run, name=name: cell(_last(run, name))) for name in names]  # type: ignore[misc]
    there = [loss for loss in losses if set(loss.cells) != {NOTHING}]
    return [Section("training", come), Section("losses at the end", there)]


def _last(run: Run, name: str) -> float | None:
    """Return the last point of the report's curve; None for a term that the run does not have at its end."""
    points = points_of(run.metrics, name)
    return thinned(points)[-1][1] if points and points[-1][0] == run.metrics[-1]["step"] else None


def _evaluations(columns: Sequence[Column]) -> tuple[list[Section], list[str]]:
    unread = [f"{column.name}: {MANY.format(', '.join(column.unread))}" for column in columns if column.unread]
    if not any(column.report for column in columns):
        return [], [*unread, "no figures: `pra eval RUN --out RUN/figures.json` measures them"]
    figures, notes = figure_sections(columns)
    told = [Row(name, [of(column) if column.report else NOTHING for column in columns]) for name, of in TOLD.items()]
    judged = Section("evaluation", [*told, *_different([_sampled(column) for column in columns])])
    return [judged, *figures], [*unread, *filter(None, map(_gone_on, columns)), *notes]


def _sampled(column: Column) -> dict[str, str] | None:
    """Return the sampling settings, and how labels were chosen; None for images from elsewhere."""
    sampling = column.known("images", "sampling") or column.known("images", "made", "sampling")
    if not isinstance(sampling, dict):
        return None
    classes, order = (column.known("images", "made", "images", part) for part in ("labels", "order"))
    if order == "in turn" and isinstance(classes, list) and classes == list(range(len(classes))):
        order = f"index % {len(classes)}"  # as of a run
    return _flattened({"sampling": sampling, "labels": column.known("images", "labels") or order})


def _gone_on(column: Column) -> str | None:
    """Tell that figures are of an earlier checkpoint."""
    newest, model = column.run.newest if column.run else None, column.known("images", "model")
    if newest is None or model is None or newest.name == Path(str(model)).name:
        return None
    return f"{column.name}: the figures are of {Path(str(model)).name}, and the run has gone on since, to {newest.name}"


def _made(column: Column, of_run: str, of_file: str) -> str:
    """Return what is known of the weights of a run, or of a file that `pra sample` has written."""
    return str(column.known("images", of_run) or column.known("images", "made", "weights", of_file) or NOTHING)


def _maker(column: Column) -> str:
    images = (column.known("images", kind) for kind in ("model", "file", "folder"))
    return next((Path(str(path)).name for path in images if path), NOTHING)


TOLD: dict[str, Callable[[Column], str]] = {
    "images": lambda column: column.text("count"),
    "made by": _maker,
    "weights": lambda column: Path(_made(column, "weights", "file")).stem,
    "weights, SHA-256": lambda column: _made(column, "weights_sha256", "sha256")[:PREFIX],
    "features": lambda column: column.text("features", "name"),
    "features, SHA-256": lambda column: column.text("features", "sha256")[:PREFIX],
    "reference": lambda column: column.text("reference", "name"),
}
"""Rows of every evaluation."""


# --- figures ------------------------------------------------------------------------------------------------

LOWER = ("fid", "sfid", "kid", "reconstruction_fid")
HIGHER = ("precision", "recall", "accuracy", "inception_score", "psnr", "ssim")
"""Figures that are good when low and when high (docs/evaluation.md); the others do not measure quality."""


def figure_sections(columns: Sequence[Column]) -> tuple[list[Section], list[str]]:
    """Return the figures by protocol, the best of each row marked where all compare; and lines that say why not."""
    apart = _reasons([column for column in columns if column.report], obstacle)
    others = _reasons([column for column in columns if column.known("reconstruction")], _other_originals)
    found = [column.report.figures if column.report else {} for column in columns]
    sections = []
    for protocol in dict.fromkeys(itertools.chain.from_iterable(found)):
        marked = not apart and not (others and protocol == "reconstruction")
        if rows := _rows(columns, [figures.get(protocol, {}) for figures in found], marked):
            sections.append(Section(f"figures, {protocol}", rows))
    what, reasons = ("figures", apart) if apart else ("reconstructions", others)
    notes = [f"{what} do not compare, and none is marked: {'; '.join(reasons)}"] if reasons else []
    if any(row.best for section in sections for row in section.rows):
        notes.append("* best of its row, by one training and one sampling each: other seeds may turn it round")
    return sections, notes


def _reasons(columns: Sequence[Column], why: Callable[[Column, Column], str | None]) -> list[str]:
    """Return why columns do not compare with the first, by ``why``."""
    return [reason for other in columns[1:] if (reason := why(columns[0], other))]


def obstacle(first: Column, other: Column) -> str | None:
    """Name the fields in which an evaluation differs from the first, so that figures do not compare; None where not."""
    found = differing(first.known(), other.known())
    fields = (f"the {name} ({shown(there)}; {first.name}: {shown(here)})" for name, (here, there) in found.items())
    return f"{other.name} differs in {' and '.join(fields)}" if found else None


def _other_originals(first: Column, other: Column) -> str | None:
    here, there = (
        f"{column.text('reconstruction', 'count')} of {column.text('reconstruction', 'source')}"
        for column in (first, other)
    )
    return None if here == there else f"{other.name} differs in the images ({there}; {first.name}: {here})"


def _rows(columns: Sequence[Column], found: Sequence[Figures], marked: bool) -> list[Row]:
    rows = []
    for name in dict.fromkeys(itertools.chain.from_iterable(found)):
        cells = [cell(figures.get(name)) for figures in found]
        if set(cells) != {NOTHING}:
            merits = [_merit(name, figures.get(name), column) for figures, column in zip(found, columns, strict=True)]
            known = {merit for merit in merits if merit is not None}
            best = [place for place, merit in enumerate(merits) if len(known) > 1 and merit == max(known)]
            rows.append(Row(name, cells, best if marked else ()))
    return rows


def _merit(name: str, value: Any, column: Column) -> float | None:
    """Return a number that is larger for better figures; None for a figure that says nothing about quality."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if name in LOWER:
        return -max(value, 0.0)  # estimates of a distance: just below 0 is 0
    if name == "accuracy":
        real = column.known("features", "held_out_accuracy")
        return min(value, real) if isinstance(real, int | float) else value
    return value if name in HIGHER else None


# --- curves -------------------------------------------------------------------------------------------------


def overlaid(columns: Sequence[Column]) -> Figure:
    """Draw the curves of those columns that are runs; refuse columns without a run, or without matplotlib."""
    metrics = {column.name: column.run.metrics for column in columns if column.run}
    if not metrics:
        raise PraError("--out draws the curves of runs: there are none. Leave it out, or add a run", option="--out")
    titles = {name: name for name in loss_terms(itertools.chain(*metrics.values()))}
    titles["state_std"] = OTHERS["state_std"]
    try:
        figure = curves(metrics, titles)
    except ImportError as error:
        raise PraError(import_failed("--out", "matplotlib", "train", error), "not-installed") from None
    for axes, name in zip(figure.axes, titles, strict=True):
        first = next(points for rows in metrics.values() if (points := points_of(rows, name)))
        if highest := max(value for _, value in first):
            axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST * highest))
    return figure
