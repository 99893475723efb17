"""A table for the terminal: sections of rows, a column per thing that is compared."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

LONGEST = 32
"""Characters of a cell; of longer ones the middle is left out."""


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
    """Return the sections below each other, columns flush right, the best of a row with a star."""
    lines: list[Row | str] = [Row("", [one_line(name) for name in names])]
    for title, rows in sections:
        lines += [title, *(Row(f"  {row.name}", _shortened(row.cells), row.best) for row in rows)]
    rows = [line for line in lines if isinstance(line, Row)]
    first = max(len(row.name) for row in rows)
    widths = [max(map(len, column)) for column in zip(*(row.cells for row in rows), strict=True)]
    return "\n".join(line if isinstance(line, str) else _line(line, first, widths) for line in lines)


def _line(row: Row, first: int, widths: Sequence[int]) -> str:
    cells = zip(row.cells, widths, strict=True)
    marked = [f"{cell:>{width}} {'*' if place in row.best else ' '}" for place, (cell, width) in enumerate(cells)]
    return f"{row.name:<{first}}  {' '.join(marked)}".rstrip()


def _shortened(cells: Sequence[str]) -> list[str]:
    """Shorten long cells, unless those of a row could then no longer be told apart."""
    whole, half = [one_line(cell) for cell in cells], (LONGEST - 3) // 2
    short = [text if len(text) <= LONGEST else f"{text[:half]}...{text[-half:]}" for text in whole]
    return short if len(set(short)) == len(set(whole)) else whole


def one_line(text: str) -> str:
    """Escape control characters: names of folders and sources must not move the terminal's cursor."""
    return text if text.isprintable() else ascii(text)
