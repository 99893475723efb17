"""The figures that the pages quote are those of the studies' tables.

A table that quotes is marked by a comment before it, which names the study and what its columns are of: a setting, or
``setting@value`` where the study varies something, as in ``<!-- figures of length: emoji-64@1200, emoji-64@4800 -->``.
Figures are FIDs at scale ``cpu``; ``setting/scale`` is another scale, and ``setting:column`` another column of the
study's rows.
"""

import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from studies import STUDIES
from studies.groups import groups
from studies.records import read_rows

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- figures of (\S+): (.+) -->\n+((?:\|.*\n)*)")
SYSTEMS = {
    "PRA": "pra",
    "inputs decoded from unperturbed states": "reconstructed",
    "states, clean inputs": "states",
    "noise on pixel inputs": "input-noise-x",
    "noise on pixel inputs, x-prediction": "input-noise-x",
    "noise on pixel inputs, v-prediction": "input-noise",
    "teacher forcing on pixels": "x-prediction",
    "teacher forcing, x-prediction": "x-prediction",
    "teacher forcing, v-prediction": "teacher-forced",
    "JiT": "jit",
    "exact rollout": "exact",
}
"""Systems by their names on the pages."""


def quoted():
    """Return for each marked table its page, its study, the contents of its columns, and its rows without the head."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, (study, columns, table) in enumerate(MARK.findall(page.read_text()), start=1):
            rows = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in table.splitlines()]
            found.append((f"{page.name}, mark {number}", study, columns.split(", "), rows[2:]))
    return found


def in_words(group, column):
    values = [row[column or "fid"] for row in group.by_seed.values()]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def belongs(group, label, value, study):
    if study in ("noise", "ablation", "recipe", "pareto"):  # PRA alone, by the value that is varied
        return group.system == "pra" and same(group.value, {"no perturbation": "1"}.get(label, label))
    return group.system == SYSTEMS[label] and (not value or same(group.value, value))


def same(value, text):
    try:
        return float(value) == float(text)
    except ValueError:
        return str(value) == text


@pytest.mark.parametrize(("place", "study", "columns", "table"), quoted(), ids=lambda value: str(value)[:40])
def test_quoted_figures_are_those_of_the_study(place, study, columns, table):
    rows = read_rows(ROOT / "studies" / study / "results.csv")
    assert table, f"{place}: no table after the mark"
    for label, *cells in table:
        assert len(cells) == len(columns), f"{place}: {label}"
        for cell, column in zip(cells, columns, strict=True):
            setting, _, other = column.partition(":")
            setting, _, value = setting.partition("@")
            setting, _, scale = setting.partition("/")
            known = groups(row for row in rows if (row["setting"], row["scale"]) == (setting, scale or "cpu"))
            # An empty cell is what has not been measured.
            expected = [in_words(group, other) for group in known if belongs(group, label, value, study)] or [""]
            assert [cell] == expected, f"{place}: {label}, {column}"


def test_pages_quote_figures_of_known_studies():
    assert {"systems", "noise"} <= {study for _, study, _, _ in quoted()} <= STUDIES.keys()
