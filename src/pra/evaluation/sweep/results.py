"""What a sweep has found: a file of figures per point, and which point is the best."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pra.errors import PraError
from pra.evaluation.comparable import differing, known, shown
from pra.evaluation.compare.table import Row, Section, rendered
from pra.evaluation.evaluate import Report
from pra.evaluation.metrics import Protocol
from pra.evaluation.report.content import cell, evaluation
from pra.evaluation.sweep.points import Point, value_text
from pra.utils.provenance import file_sha256

PROTOCOL = Protocol.TORCH_FIDELITY.value
SHOWN = ("fid", "kid", "precision", "recall", "inception_score", "accuracy")
OPEN_ENDED = ("guidance", "temperature", "shift")
"""Settings whose best value may lie beyond those that were tried; more steps cost more."""
IMAGES = {"weights": "weights_sha256", "settings": "sampling", "labels": "labels", "seeds": "seeds"}
"""Fields of a report's images that a sweep holds fixed."""


@dataclass(frozen=True)
class Result:
    """A point and its figures."""

    point: Point
    report: Report

    def figure(self, name: str) -> float | None:
        """Return a figure by torch-fidelity's protocol; None where it is missing or not finite."""
        value = self.report.figures.get(PROTOCOL, {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None


def rank(result: Result) -> float:
    """Return the FID, by which the best comes first and results without one come last."""
    fid = result.figure("fid")
    return math.inf if fid is None else fid


def find_best(results: Sequence[Result]) -> Result | None:
    """Return the result with the lowest FID, the first of equal ones; None where none is finite."""
    best = min(results, key=rank)
    return best if math.isfinite(rank(best)) else None


def table(results: Sequence[Result]) -> str:
    """Return a line per point, a column per figure that any has, the best FID marked."""
    names = [name for name in SHOWN if any(result.figure(name) is not None for result in results)]
    best = find_best(results)
    rows = [
        Row(result.point.name, [cell(result.figure(name)) for name in names], (0,) if result is best else ())
        for result in results
    ]
    return rendered(names, [Section(f"figures, {PROTOCOL}", rows)])


def hints(results: Sequence[Result], best: Result) -> Iterator[str]:
    """Yield a line for each setting whose best value is the last of those tried."""
    for name in OPEN_ENDED:
        tried = sorted({result.point.changes[name] for result in results if name in result.point.changes})
        value = best.point.changes.get(name)
        none = name == "guidance" and value == 1.0 == tried[0]  # less guidance than none is no use
        if len(tried) > 1 and value in (tried[0], tried[-1]) and not none:
            end = "largest" if value == tried[-1] else "smallest"
            yield f"the best {name}, {value_text(value)}, is the {end} that was tried: a better one may lie beyond"


def file_of(point: Point, folder: Path) -> Path:
    """Return the file of a point's figures, as `pra eval --out` writes them."""
    return folder / f"{point.name}.json"


def read_results(folder: Path, expected: dict[str, dict[str, Any]]) -> dict[str, Report]:
    """Return the reports that an earlier sweep has left of the ``expected`` points, by name.

    The values of ``expected`` are the provenance that each report would have now.

    Raises:
        PraError: a file that is not a report, or any report in the folder of another checkpoint, labels, seeds,
            features or reference: `pra compare` takes all of a folder.
    """
    found = {}
    hashed = functools.cache(file_sha256)
    for path in sorted(folder.glob("*.json")):
        report, now = evaluation(path), expected.get(path.stem)
        if now and (report is None or PROTOCOL not in report.figures):
            raise PraError(f"{path} is not a report of pra eval. Use another --out, or remove it", "exists", path=path)
        if report is None:
            continue
        held = dict.fromkeys(IMAGES)
        if now is None:  # of other settings, and perhaps of another average
            now = next(iter(expected.values()))
            del held["settings"]
            weights = Path(now["images"]["model"]) / str(known(report.provenance, "images", "weights"))
            now = now | {"images": now["images"] | ({"weights_sha256": hashed(weights)} if weights.is_file() else {})}
        else:
            found[path.stem] = report
        _check_same(path, report.provenance, now, list(held))
    return found


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any], held: Sequence[str]) -> None:
    pairs = {what: tuple(known(values, "images", IMAGES[what]) for values in (before, now)) for what in held}
    other = {what: pair for what, pair in pairs.items() if pair[0] != pair[1]} | differing(before, now)
    for what, (there, here) in other.items():
        problem = f"{path} differs in the {what} ({shown(there)}; now {shown(here)})"
        raise PraError(f"{problem}. Use another --out, or remove {path.parent}", "mismatch", path=path, what=what)
