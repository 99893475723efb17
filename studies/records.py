"""A study's rows as CSV: its result, and the record by which it resumes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pra.errors import PraError
from pra.utils.files import remedy, write_atomically
from studies.measures import Row

RESULTS = "results.csv"
COLUMNS = (
    "dataset", "setting", "scale", "tokens", "system", "value", "seed", "guidance", "fid", "accuracy", "parameters",
    "steps", "train_seconds", "solver", "solver_steps", "evaluations", "renormalise", "images", "kid", "precision",
    "recall", "seams", "reconstruction_fid", "psnr", "ssim", "reconstruction_seams", "position", "input_gap",
    "condition_gap", "training_loss",
    "rollout_loss", "layer", "pooling", "time", "top1", "validation", "held_out", "sample_seconds",
    "seconds_per_image", "time_ratio",
    "run", "measured", "judge", "commit", "hardware",
)  # fmt: skip
"""The columns of all studies; a column that a study does not fill is left out of its file."""


TIMED = ("seconds_per_image", "time_ratio")
"""Columns of the study `pareto`. Times compare within one session only, so other studies do not take them over."""


class Records:
    """The rows of all studies in a folder, and those of one of them in its file.

    A row belongs to a run (``run``, a hash of the settings that decide its weights) and to a measurement
    (``measured``). If another study has made the same measurement of the same run, its figures are used.
    """

    def __init__(self, folder: Path, study: str) -> None:
        """Reads existing rows, and makes the study's folder: an unsuitable one is refused before any work.

        Raises:
            PraError: a file that is not a study's table, or a folder that cannot be made.
        """
        self.path = folder / study / RESULTS
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PraError(f"{self.path.parent} cannot be made ({error.strerror}); {remedy(error)}") from None
        self.rows = read_rows(self.path) if self.path.exists() else []
        # A measurement has one row, or one per position or probed layer, under however many labels it stands.
        self._known: dict[tuple[str, str], dict[tuple[object, ...], Row]] = {}
        for path in sorted(folder.glob(f"*/{RESULTS}")):
            rows = read_rows(path)
            self._remember({name: value for name, value in row.items() if name not in TIMED} for row in rows)
        self._remember(self.rows)

    def known(self, run: str, measured: str, judge: str) -> list[Row]:
        """The rows of a measurement that this study or another has made, or an empty list.

        A measurement by another judge than ``judge``, or an unrecorded one, does not count. Probes have no judge.
        """
        rows = self._known.get((run, measured), {}).values()
        return [row for row in rows if row.get("judge", "" if "fid" in row else judge) == judge]

    def _remember(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._known.setdefault((row["run"], row["measured"]), {})[tuple(row.get(name) for name in _PLACES)] = row

    def replace(self, rows: Iterable[Row]) -> None:
        """Replaces the rows of the same run, measurement and label, and writes the file.

        Raises:
            PraError: the disk is full or refuses.
        """
        new = [{name: value for name, value in row.items() if value is not None and value != ""} for row in rows]
        labels = {_label(row) for row in new}
        self.rows = [row for row in self.rows if _label(row) not in labels] + new
        self.rows.sort(key=_order)
        self._remember(new)
        used = [column for column in COLUMNS if any(column in row for row in self.rows)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, used, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: _cell(row.get(column)) for column in used} for row in self.rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, numbers as numbers.

    Raises:
        PraError: it cannot be read, or is not a study's table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{key: _value(key, text) for key, text in row.items() if text} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PraError(f"{path} cannot be read ({error}); restore it, or remove it to measure again") from None
    if any(not {"run", "measured", "setting", "system", "seed"} <= row.keys() for row in rows):
        raise PraError(f"{path} is not a study's table: it lacks the columns run, measured, setting, system or seed")
    return rows


_PLACES = ("position", "layer", "pooling")
"""The columns that tell the rows of one measurement apart."""

_TEXT = (
    "dataset", "setting", "scale", "system", "solver", "run", "measured", "judge", "commit", "hardware", "pooling",
)  # fmt: skip


def _value(column: str, text: str) -> str | float | int | bool:
    if column in _TEXT:
        return text
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _label(row: Row) -> tuple[object, ...]:
    """Return what a row is about; a number is the same with and without a decimal point."""
    return tuple(_sortable(row.get(name)) for name in ("setting", "scale", "system", "value", "seed", "measured"))


def _order(row: Row) -> tuple[object, ...]:
    names = ("scale", "setting", "system", "value", "seed", "measured", *_PLACES)
    return tuple(_sortable(row.get(name)) for name in names)


def _sortable(value: object) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value or ""))
