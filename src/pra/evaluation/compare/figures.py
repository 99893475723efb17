"""Figures beside each other: where they compare, and which is the better one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from pra.evaluation.compare.columns import Column
from pra.evaluation.compare.table import Row, Section
from pra.evaluation.report.content import cell

LOWER = ("fid", "sfid", "kid", "reconstruction_fid")
HIGHER = ("precision", "recall", "accuracy", "inception_score", "psnr", "ssim")
"""Which figures are good when low and when high (docs/evaluation.md); the others are no measure of quality."""

MEASURED_WITH = (("kid", "subsets"), ("precision_recall", "neighbours"), ("seed_of_subsets",))
"""Places in the provenance of what the protocols leave to us."""

PREFIX = 12
"""Characters of a SHA-256 that are shown."""


def figure_sections(columns: Sequence[Column]) -> tuple[list[Section], list[str]]:
    """The figures by protocol, the best of each row marked where all compare; and the lines that say why none is."""
    judged = [column for column in columns if column.report is not None]
    copied = [column for column in judged if column.known("reconstruction")]
    apart = [reason for other in judged[1:] if (reason := obstacle(judged[0], other))]
    others = [reason for other in copied[1:] if (reason := other_originals(copied[0], other))]
    sections = []
    for protocol in dict.fromkeys(name for column in judged if column.report for name in column.report.figures):
        marked = not apart and not (others and protocol == "reconstruction")
        if rows := _rows(columns, protocol, marked):
            sections.append(Section(f"figures, {protocol}", rows))
    notes = [f"figures do not compare, and none is marked: {'; '.join(apart)}"] if apart else []
    if others and not apart:
        notes = [f"reconstructions do not compare, and none is marked: {'; '.join(others)}"]
    if any(row.best for section in sections for row in section.rows):
        notes.append("* best of its row, by one training and one sampling each: other seeds may turn it round")
    return sections, notes


def _rows(columns: Sequence[Column], protocol: str, marked: bool) -> list[Row]:
    """A row per figure that somebody has."""
    reports = [column.report.figures.get(protocol, {}) if column.report else {} for column in columns]
    rows = []
    for name in dict.fromkeys(itertools.chain.from_iterable(reports)):
        cells = [cell(figures.get(name)) for figures in reports]
        if set(cells) == {"-"}:
            continue
        merits = [_merit(name, figures.get(name), column) for figures, column in zip(reports, columns, strict=True)]
        rows.append(Row(name, cells, _best(merits) if marked else ()))
    return rows


def _merit(name: str, value: Any, column: Column) -> float | None:
    """Larger is better. None where a figure is not there, or says nothing about quality."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if name in LOWER:
        return -max(value, 0.0)  # estimates of a distance: just below 0 is 0
    if name == "accuracy":
        real = column.known("features", "held_out_accuracy")
        return min(value, real) if isinstance(real, int | float) else value
    return value if name in HIGHER else None


def _best(merits: Sequence[float | None]) -> list[int]:
    """The places of the largest; none where all are equal."""
    known = [merit for merit in merits if merit is not None]
    if len(set(known)) < 2:
        return []
    return [place for place, merit in enumerate(merits) if merit == max(known)]


# --- whether they compare -----------------------------------------------------------------------------------


def obstacle(first: Column, other: Column) -> str | None:
    """In what an evaluation differs from the first, so that their figures do not compare; None where they do."""
    features = _features(first, other)
    parts = [features, _reference(first, other, not features), _count(first, other), _protocol(first, other)]
    found = [part for part in parts if part]
    return f"{other.name} has {' and '.join(found)}" if found else None


def other_originals(first: Column, other: Column) -> str | None:
    """The same for reconstructions, of other images."""
    here, there = (
        f"{column.text('reconstruction', 'count')} of {column.text('reconstruction', 'source')}"
        for column in (first, other)
    )
    return None if here == there else f"{other.name} has those of other images ({there}; {first.name}: {here})"


def _features(first: Column, other: Column) -> str | None:
    here, there = (column.known("features", "sha256") for column in (first, other))
    if here is None or there is None:
        unsaid = first if here is None else other
        return f"perhaps other features: {unsaid.file} does not say which"
    if here != there:
        names = (_named(column, "features", "sha256") for column in (other, first))
        return f"other features ({f'; {first.name}: '.join(names)})"
    ours, theirs = (column.known("features", "versions") for column in (first, other))
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours != theirs:
        changed = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        return f"features by another {changed} ({theirs.get(changed)}; {first.name}: {ours.get(changed)})"
    return None


def _reference(first: Column, other: Column, same_features: bool) -> str | None:
    """By the images where both evaluations know them. By the statistics of older ones: equal ones are of one reference,
    and others of another where they were finished in a file; measured ones may differ by rounding."""

    def both(key: str) -> tuple[Any, Any]:
        return first.known("reference", key), other.known("reference", key)

    key = "images_sha256"
    if None in both(key):
        if not same_features:
            return None  # the statistics differ by their features already
        key, sums = "sha256", both("sha256")
        if None in sums or (sums[0] != sums[1] and None in both("file_sha256")):
            names = (column.text("reference", "name") for column in (other, first))
            return (
                f"perhaps another reference ({f'; {first.name}: '.join(names)}), which cannot be told without the "
                "images_sha256 of both"
            )
    here, there = both(key)
    if here == there:
        return None
    names = (_named(column, "reference", key) for column in (other, first))
    return f"another reference ({f'; {first.name}: '.join(names)})"


def _count(first: Column, other: Column) -> str | None:
    here, there = first.text("count"), other.text("count")
    return None if here == there else f"{there} images ({first.name}: {here})"


def _protocol(first: Column, other: Column) -> str | None:
    """What older evaluations do not say has never been otherwise."""
    for path in MEASURED_WITH:
        here, there = first.known(*path), other.known(*path)
        if None not in (here, there) and here != there:
            return f"another protocol ({' '.join(path)} {there}; {first.name}: {here})"
    return None


def _named(column: Column, part: str, key: str) -> str:
    """``"classifier 5e2c416ddfd3"``: name and hash."""
    return f"{column.text(part, 'name')} {column.text(part, key)[:PREFIX]}"
