"""Figures beside each other: where they compare, and which is the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from pra.evaluation.comparable import differing, shown
from pra.evaluation.compare.columns import Column
from pra.evaluation.compare.table import Row, Section
from pra.evaluation.report.content import cell

LOWER = ("fid", "sfid", "kid", "reconstruction_fid")
HIGHER = ("precision", "recall", "accuracy", "inception_score", "psnr", "ssim")
"""Figures that are good when low and when high (docs/evaluation.md); the others do not measure quality."""


def figure_sections(columns: Sequence[Column]) -> tuple[list[Section], list[str]]:
    """Return the figures by protocol, the best of each row marked where all compare; and lines that say why not."""
    judged = [column for column in columns if column.report is not None]
    copied = [column for column in judged if column.known("reconstruction")]
    apart = [reason for other in judged[1:] if (reason := obstacle(judged[0], other))]
    others = [reason for other in copied[1:] if (reason := _other_originals(copied[0], other))]
    sections = []
    for protocol in dict.fromkeys(name for column in judged if column.report for name in column.report.figures):
        marked = not apart and not (others and protocol == "reconstruction")
        if rows := _rows(columns, protocol, marked):
            sections.append(Section(f"figures, {protocol}", rows))
    what, reasons = ("figures", apart) if apart else ("reconstructions", others)
    notes = [f"{what} do not compare, and none is marked: {'; '.join(reasons)}"] if reasons else []
    if any(row.best for section in sections for row in section.rows):
        notes.append("* best of its row, by one training and one sampling each: other seeds may turn it round")
    return sections, notes


def obstacle(first: Column, other: Column) -> str | None:
    """Name the fields in which an evaluation differs from the first, so that figures do not compare; None where not."""
    assert first.report is not None
    assert other.report is not None
    found = differing(first.report.provenance, other.report.provenance)
    fields = (f"the {name} ({shown(there)}; {first.name}: {shown(here)})" for name, (here, there) in found.items())
    return f"{other.name} differs in {' and '.join(fields)}" if found else None


def _other_originals(first: Column, other: Column) -> str | None:
    here, there = (
        f"{column.text('reconstruction', 'count')} of {column.text('reconstruction', 'source')}"
        for column in (first, other)
    )
    return None if here == there else f"{other.name} differs in the images ({there}; {first.name}: {here})"


def _rows(columns: Sequence[Column], protocol: str, marked: bool) -> list[Row]:
    reports = [column.report.figures.get(protocol, {}) if column.report else {} for column in columns]
    rows = []
    for name in dict.fromkeys(itertools.chain.from_iterable(reports)):
        cells = [cell(figures.get(name)) for figures in reports]
        if set(cells) != {"-"}:
            merits = [_merit(name, figures.get(name), column) for figures, column in zip(reports, columns, strict=True)]
            rows.append(Row(name, cells, _best(merits) if marked else ()))
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


def _best(merits: Sequence[float | None]) -> list[int]:
    """Return the places of the largest; none where all are equal."""
    known = [merit for merit in merits if merit is not None]
    if len(set(known)) < 2:
        return []
    return [place for place, merit in enumerate(merits) if merit == max(known)]
