"""The table of `pra compare`: settings that differ, progress, losses and figures."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pra.config import RunConfig, to_dict
from pra.errors import PraError, one_line
from pra.evaluation.comparable import differing, known, shown
from pra.evaluation.evaluate import Figures, Report
from pra.evaluation.report import Progress, cell, evaluation, gone_on, judged, progress
from pra.models import count_parameters
from pra.models.weights import newest_checkpoint
from pra.training.plots import OTHERS, curves
from pra.training.run import VALIDATION, loss_terms, points_of, read_metrics, read_run
from pra.utils.extras import import_failed
from pra.utils.files import expand

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EITHER = "Give the folder of a run, or a JSON that `pra eval --out` wrote"


@dataclass(frozen=True)
class Column:
    """One argument: a run, and the report ``figures.json`` in its folder if there is one, or a report alone.

    ``metrics`` are the lines of the run's ``metrics.jsonl``, at least one, ``newest`` its newest checkpoint.
    """

    name: str
    report: Report | None
    config: RunConfig | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    progress: Progress | None = None
    newest: Path | None = None

    def known(self, *path: str) -> Any:
        """Return a value of the report's provenance; None where a part of the path is missing."""
        return known(self.report and self.report.provenance, *path)


def read_columns(words: Sequence[str]) -> list[Column]:
    """Read the arguments of `pra compare`, ``[NAME=]PATH`` each, by default named after the folder or file.

    If two have the same name, the name is the whole path. Refuse fewer than two arguments, duplicates, duplicate names,
    and paths that are neither an evaluation nor a run with metrics.
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
    """Split name and path. Both may hold ``=``: the split whose path exists wins."""
    for place in (-1, *(place for place, letter in enumerate(word) if letter == "=" and place)):
        path = expand(word[place + 1 :])
        if os.path.exists(path):
            return word[:place] if place > 0 else None, path
    raise PraError(f"no file or folder {word}. {EITHER}, as PATH or NAME=PATH", "missing", path=word)


def _read(name: str, path: Path) -> Column:
    if not path.is_dir():
        report = evaluation(path)
        if report is None:
            raise PraError(f"{path} holds no figures. {EITHER}", "unreadable", path=path)
        return Column(name, report)
    figures, config = path / "figures.json", read_run(path)
    come = progress(path, config)
    if come is None:
        problem = f"the run {path} has no line in metrics.jsonl yet"
        raise PraError(f"{problem}. Wait for {config.train.log_every} steps (train.log_every)", "missing", path=path)
    report = evaluation(figures) if figures.exists() else None
    return Column(name, report, config, read_metrics(path), come, newest_checkpoint(path))


NOTHING = "-"
PARTS = 120
"""Parts of the log: a loss at the end is the mean over the last part."""
HIGHEST = 3
"""An axis ends at this multiple of the first run's highest value, so that an exploding loss does not hide others."""


def compared(columns: Sequence[Column]) -> str:
    """Return the whole table as text for a terminal."""
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
    settings = [_flattened(to_dict(c.config) | {"targets": None}) if c.config else None for c in columns]
    if sum(values is not None for values in settings) < 2:
        return []
    rows = _different(settings)
    return [Section("settings that differ", rows) if rows else Section("settings: the same")]


def _training(columns: Sequence[Column]) -> list[Section]:
    if not any(column.config for column in columns):
        return []
    made = [
        _progress(column.config, column.progress) if column.config and column.progress else {} for column in columns
    ]
    come = [Row(name, [values.get(name, NOTHING) for values in made]) for name in next(filter(None, made))]
    terms = loss_terms(line for column in columns for line in column.metrics)
    names = [*terms, *(VALIDATION + name for name in terms)]
    losses = [Row(name, [cell(_last(column.metrics, name)) for column in columns]) for name in names]
    there = [loss for loss in losses if set(loss.cells) != {NOTHING}]
    return [Section("training", come), Section("losses at the end", there)]


def _progress(config: RunConfig, progress: Progress) -> dict[str, str]:
    return {
        "parameters": f"{sum(count_parameters(config.model).values()) / 1e6:.3f} M",
        "steps": f"{progress.steps:,} of {config.train.steps:,}",
        "images seen": f"{progress.images:,}",
        "seconds of training": f"{progress.seconds:,.0f}",
        "images / s": f"{progress.images_per_second:.3g}",
    }


def _last(metrics: list[dict[str, float]], name: str) -> float | None:
    """Return the mean over the last of :data:`PARTS`; None for a term that the run does not have at its end."""
    points = points_of(metrics, name)
    if not points or points[-1][0] != metrics[-1]["step"]:
        return None
    size = math.ceil(len(points) / PARTS)
    return statistics.fmean(value for _, value in points[(len(points) - 1) // size * size :])


def _evaluations(columns: Sequence[Column]) -> tuple[list[Section], list[str]]:
    if not any(column.report for column in columns):
        return [], ["no figures: `pra eval RUN --out RUN/figures.json` measures them"]
    figures, notes = figure_sections(columns)
    facts = [judged(column.report.provenance) if column.report else {} for column in columns]
    told = [Row(name, [known.get(name, NOTHING) for known in facts]) for name in next(filter(None, facts))]
    evaluation = Section("evaluation", [*told, *_different([_sampled(column) for column in columns])])
    since = [
        f"{column.name}: the figures are of {known['made by']}, and {later}"
        for column, known in zip(columns, facts, strict=True)
        if column.report and (later := gone_on(column.report.provenance, column.newest))
    ]
    return [evaluation, *figures], [*since, *notes]


def _sampled(column: Column) -> dict[str, str] | None:
    """Return the sampling settings, and how labels were chosen; None for images from elsewhere."""
    sampling = column.known("images", "sampling") or column.known("images", "made", "sampling")
    if not isinstance(sampling, dict):
        return None
    classes, order = (column.known("images", "made", "images", part) for part in ("labels", "order"))
    if order == "in turn" and isinstance(classes, list) and classes == list(range(len(classes))):
        order = f"index % {len(classes)}"  # as of a run
    return _flattened({"sampling": sampling, "labels": column.known("images", "labels") or order})


# --- figures ------------------------------------------------------------------------------------------------

LOWER = ("fid", "sfid", "kid", "reconstruction_fid")
HIGHER = (
    "precision", "recall", "accuracy", "inception_score", "psnr", "ssim",
    "retrieval_r1", "retrieval_r10", "style_obeyed", "clip_score",
)  # fmt: skip
"""Figures that are good when low and when high (docs/evaluation.md); the others do not measure quality."""


def figure_sections(columns: Sequence[Column]) -> tuple[list[Section], list[str]]:
    """Return the figures by protocol, with the best of each row marked if all compare, and lines that explain it."""
    reported = [column for column in columns if column.report]
    apart = [reason for other in reported[1:] if (reason := obstacle(reported[0], other))]
    copies = {
        column.name: f"{column.known('reconstruction', 'count')} of {column.known('reconstruction', 'source')}"
        for column in columns
        if column.known("reconstruction")
    }
    first = next(iter(copies), "")
    others = [
        f"{name} differs in the images ({images}; {first}: {copies[first]})"
        for name, images in copies.items()
        if images != copies[first]
    ]
    found = [column.report.figures if column.report else {} for column in columns]
    sections = []
    for protocol in dict.fromkeys(itertools.chain.from_iterable(found)):
        marked = not apart and not (others and protocol == "reconstruction")
        if rows := _rows(columns, [figures.get(protocol, {}) for figures in found], marked):
            sections.append(Section(f"figures, {protocol}", rows))
    what, reasons = ("figures", apart) if apart else ("reconstructions", others)
    notes = [f"{what} do not compare, and none is marked: {'; '.join(reasons)}"] if reasons else []
    if any(row.best for section in sections for row in section.rows):
        notes.append("* best of its row, by one training and one sampling each: other seeds may give another order")
    return sections, notes


def obstacle(first: Column, other: Column) -> str | None:
    """Return the fields that keep an evaluation from being compared with the first; None if they compare."""
    found = differing(first.known(), other.known())
    fields = (f"the {name} ({shown(there)}; {first.name}: {shown(here)})" for name, (here, there) in found.items())
    return f"{other.name} differs in {' and '.join(fields)}" if found else None


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
    metrics = {column.name: column.metrics for column in columns if column.metrics}
    if not metrics:
        raise PraError("--out draws the curves of runs. Add a run, or leave --out out", option="--out")
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


# --- the table for the terminal ----------------------------------------------------------------------------

LONGEST = 32
"""Characters of a cell; longer cells lose their middle."""


class Row(NamedTuple):
    """A name and a cell per column; ``best`` are the places of the cells to mark."""

    name: str
    cells: Sequence[str]
    best: Collection[int] = ()


class Section(NamedTuple):
    """Rows under a title."""

    title: str
    rows: Sequence[Row] = ()


def rendered(names: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the sections one below the other, with right-aligned columns and a star at the best of a row."""
    lines: list[Row | str] = [Row("", [one_line(name) for name in names])]
    for title, rows in sections:
        lines += [one_line(title), *(Row(f"  {one_line(row.name)}", _shortened(row.cells), row.best) for row in rows)]
    rows = [line for line in lines if isinstance(line, Row)]
    first = max(len(row.name) for row in rows)
    widths = [max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)]

    def line(row: Row) -> str:
        cells = zip(row.cells, widths, strict=True)
        marked = [f"{cell:>{width}} {'*' if place in row.best else ' '}" for place, (cell, width) in enumerate(cells)]
        return f"{row.name:<{first}}  {' '.join(marked)}".rstrip()

    return "\n".join(row if isinstance(row, str) else line(row) for row in lines)


def _shortened(cells: Sequence[str]) -> list[str]:
    """Shorten long cells, unless two cells of a row would then look the same."""
    whole, half = [one_line(cell) for cell in cells], (LONGEST - 3) // 2
    short = [text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}" for text in whole]
    return short if len(set(short)) == len(set(whole)) else whole
