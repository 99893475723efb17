"""A table for the terminal: sections of rows, a column per thing that is compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

LONGEST = 32
"""Characters of a cell; of longer ones the middle is left out."""


@dataclass(frozen=True)
class Row:
    """A name and a cell per column; ``best`` are the places of the cells to mark."""

    name: str
    cells: Sequence[str]
    best: Collection[int] = ()


@dataclass(frozen=True)
class Section:
    """Rows under a title."""

    title: str
    rows: Sequence[Row] = ()


def rendered(names: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the sections below each other, columns flush right, the best of a row with a star."""
    shown = [[_cells(row) for row in section.rows] for section in sections]
    rows = [[one_line(name) for name in names], *(cells for section in shown for cells in section)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first = max((len(row.name) + 2 for section in sections for row in section.rows), default=0)
    lines = [_line("", rows[0], (), first, widths)]
    for section, cells in zip(sections, shown, strict=True):
        lines.append(section.title)
        for row, texts in zip(section.rows, cells, strict=True):
            lines.append(_line(f"  {row.name}", texts, row.best, first, widths))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str], best: Collection[int], first: int, widths: Sequence[int]) -> str:
    marked = [
        f"{cell:>{width}}{' *' if place in best else '  '}"
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"{name:<{first}}  {' '.join(marked)}".rstrip()


def _cells(row: Row) -> list[str]:
    """Shorten long cells, unless those of a row could then no longer be told apart."""
    whole = [one_line(cell) for cell in row.cells]
    short = [_shortened(cell) for cell in whole]
    return short if len(set(short)) == len(set(whole)) else whole


def _shortened(text: str) -> str:
    half = (LONGEST - 3) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}"


def one_line(text: str) -> str:
    """Escape control characters: names of folders and sources must not move the terminal's cursor."""
    return text if text.isprintable() else ascii(text)
