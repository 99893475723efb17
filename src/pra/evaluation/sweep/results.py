"""What a sweep has found: a file of figures per point, and which point is the best."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pra.errors import PraError
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


@dataclass(frozen=True)
class Result:
    """A point and its figures."""

    point: Point
    report: Report

    def figure(self, name: str) -> float | None:
        """By torch-fidelity's protocol; None where it is not there or not finite."""
        value = self.report.figures.get(PROTOCOL, {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None


def rank(result: Result) -> float:
    """Its FID, by which the best comes first; those without one come last."""
    fid = result.figure("fid")
    return math.inf if fid is None else fid


def find_best(results: Sequence[Result]) -> Result | None:
    """The one with the lowest FID, the first of equal ones; None where none is finite."""
    best = min(results, key=rank)
    return best if math.isfinite(rank(best)) else None


def table(results: Sequence[Result]) -> str:
    """A line per point, a column per figure that somebody has, the best FID marked."""
    names = [name for name in SHOWN if any(result.figure(name) is not None for result in results)]
    best = find_best(results)
    rows = [
        Row(result.point.name, [cell(result.figure(name)) for name in names], (0,) if result is best else ())
        for result in results
    ]
    return rendered(names, [Section(f"figures, {PROTOCOL}", rows)])


def hints(results: Sequence[Result], best: Result) -> Iterator[str]:
    """Where the best value of a setting is the last of those tried, a line that says so."""
    for name in OPEN_ENDED:
        tried = sorted({result.point.changes[name] for result in results if name in result.point.changes})
        value = best.point.changes.get(name)
        none = name == "guidance" and value == 1.0 == tried[0]  # less guidance than none is no use
        if len(tried) > 1 and value in (tried[0], tried[-1]) and not none:
            end = "largest" if value == tried[-1] else "smallest"
            yield f"the best {name}, {value_text(value)}, is the {end} that was tried: a better one may lie beyond"


# --- files --------------------------------------------------------------------------------------------------


def file_of(point: Point, folder: Path) -> Path:
    """Where the figures of a point lie, as `pra eval --out` writes them."""
    return folder / f"{point.name}.json"


def read_result(point: Point, folder: Path, now: dict[str, Any]) -> Result | None:
    """What an earlier sweep has found for a point; None where there is nothing.

    Args:
        point: the point.
        folder: the sweep's.
        now: the :func:`identity` that its figures would have if they were measured now.

    Raises:
        PraError: a file that is no report of ours, or one of other images, features or reference.
    """
    path = file_of(point, folder)
    if not path.exists():
        return None
    report = evaluation(path)
    if report is None or PROTOCOL not in report.figures:
        raise PraError(f"{path} is no report of pra eval; choose another --out, or remove it")
    _check_same(path, report, now)
    return Result(point, report)


def check_folder(folder: Path, known: dict[str, Any]) -> None:
    """Whether all that lies in a sweep's folder compares with what is to come, whatever settings and average it is of.

    Args:
        folder: the sweep's.
        known: the provenance of a report to come.

    Raises:
        PraError: figures of another checkpoint, labels, seeds, features or reference.
    """
    model = Path(known["images"]["model"])
    hashes = functools.cache(lambda name: file_sha256(model / name))
    for path in sorted(folder.glob("*.json")):
        if (report := evaluation(path)) is not None:
            file = str(_known(report.provenance, "images", "weights"))
            images = known["images"] | ({"weights_sha256": hashes(file)} if (model / file).is_file() else {})
            now = identity(known | {"images": images})
            _check_same(path, report, {what: value for what, value in now.items() if what != "settings"})


def _check_same(path: Path, report: Report, now: dict[str, Any]) -> None:
    before = identity(report.provenance)
    for what, value in now.items():
        if before[what] != value:
            raise PraError(
                f"{path} is of other {what} ({_brief(before[what])}; now {_brief(value)}): choose another --out, or "
                f"remove {path.parent} to measure anew"
            )


def identity(provenance: dict[str, Any]) -> dict[str, Any]:
    """What figures depend on, from the provenance of a report."""
    reference = [_known(provenance, "reference", name) for name in ("images_sha256", "sha256")]
    return {
        "weights": _known(provenance, "images", "weights_sha256"),
        "settings": _known(provenance, "images", "sampling"),
        "labels": _known(provenance, "images", "labels"),
        "seeds": _known(provenance, "images", "seeds"),
        "features": _known(provenance, "features", "sha256"),
        "reference images": reference[0] or reference[1],
    }


def _known(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _brief(value: Any) -> str:
    text = ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text
