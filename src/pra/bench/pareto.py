"""Quality against time: FID and seconds per image of a model under several settings, and their Pareto front."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pra.bench.device import timed
from pra.config import AnyModelConfig, SamplingConfig, Solver, check_sampling, from_dict, to_dict
from pra.config.checks import PositiveFloat
from pra.errors import PraError
from pra.evaluation.judging import Subject
from pra.evaluation.sweep import AVERAGE, Point, Result, points
from pra.models.weights import weights_name
from pra.sampling import Sampler
from pra.sampling.requests import changed_sampling
from pra.utils.files import REPAIR, check_fields, read_json, unreadable
from pra.utils.provenance import file_sha256

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER, PARETO, PICTURE = "pareto", "pareto.json", "pareto.png"

TIERS = {"best": 1.0, "balanced": 1.05, "fast": 1.25}
"""Names of points on the front: the fastest point whose FID is at most this multiple of the lowest FID."""

HEADS: tuple[dict[str, Any], ...] = (
    *({"solver": "midpoint", "steps": steps} for steps in (1, 2, 3)),
    *({"solver": "adams-bashforth", "steps": steps} for steps in (2, 3, 4)),
    {"solver": "midpoint", "raster_steps": [2, 1, 1]},
    {"solver": "adams-bashforth", "raster_steps": [4, 3, 2]},
    *({"solver": "shortcut", "steps": steps} for steps in (1, 2, 4)),
    {"solver": "shortcut", "raster_steps": [4, 2, 1]},
)
"""Settings to try for a head; shortcut settings only if the model has a second head."""

WHOLE = (0.25, 0.5, 1.0)
"""Step counts to try for a model that makes all patches at once, as fractions of its own."""


@dataclass(frozen=True)
class Row:
    """One setting with its FID, ``None`` if images are not finite, and its seconds per image.

    ``ratio`` holds the median, lowest and highest ratio of the seconds to the first row's, over several rounds. A row
    is on the ``front`` if every other row is worse in FID or in seconds, or equal in both.
    """

    name: str
    options: list[str]
    sampling: dict[str, Any]
    fid: float | None
    seconds_per_image: float
    ratio: tuple[float, float, float]
    front: bool = False


@dataclass(frozen=True)
class Tier:
    """A named setting of the front; ``options`` are those of `pra sample`."""

    name: str
    sampling: SamplingConfig
    options: list[str]
    fid: float
    seconds_per_image: float
    ratio: float


def tried(subject: Subject, over: Sequence[str] = ()) -> list[Point]:
    """Return the settings to try, the model's own first.

    ``over`` are lines for :func:`pra.evaluation.sweep.points`. The default is :data:`HEADS` (or :data:`WHOLE`), with
    guidance and without.

    Raises:
        PraError: a line that cannot be read, or settings that the model cannot be sampled with.
    """
    sampler = subject.sampled("pra bench pareto")
    own, config = sampler.config, sampler.model.config
    if over:
        found = points(own, over)
        for point in found:
            if AVERAGE in point.changes:
                raise PraError(f"--over {AVERAGE}: settings of the sampler are compared. Leave it out", "unsupported")
            check_sampling(config, point.sampling)
    else:
        found = [named(sampling) for sampling in _usual(own, config)]
    unique: dict[SamplingConfig, Point] = {}
    for point in (named(own), *found):
        unique.setdefault(point.sampling, point)
    return list(unique.values())


def _usual(own: SamplingConfig, config: AnyModelConfig) -> Iterator[SamplingConfig]:
    heads: Iterable[dict[str, Any]] = HEADS
    if not config.autoregressive:
        heads = ({"steps": max(1, round(share * own.steps))} for share in WHOLE)
    for changes in heads:
        if changes.get("solver") == Solver.SHORTCUT.value:
            if not config.has_shortcut:
                continue
            changes = changes | {"time_grid": "uniform", "shift": 1.0}
        for guidance in (own.guidance, 1.0):
            one = changed_sampling(own, {"times": None, "guidance": guidance} | changes)
            with contextlib.suppress(PraError):  # a raster shorter than the schedule
                check_sampling(config, one)
                yield one


def named(sampling: SamplingConfig) -> Point:
    """Return the point of these settings, named by its guidance, solver and steps."""
    values = to_dict(sampling)
    steps = "steps" if sampling.raster_steps is None else "raster_steps"
    return Point({name: values[name] for name in ("guidance", "solver", steps)}, sampling)


def seconds(subject: Subject, settings: Sequence[Point], batch: int, rounds: int) -> list[list[float]]:
    """Return the seconds per image of each setting in each round. Settings take turns, ``batch`` images at a time."""
    assert subject.requests is not None, "a model that is sampled has requests"
    samplers = [subject.sampled_with(point.sampling).sampled("time") for point in settings]
    return in_turn(samplers, rounds, subject.requests.part(range(min(batch, subject.count))))


def in_turn(
    samplers: Sequence[Sampler], rounds: int, request: tuple[Sequence[int], Sequence[int], Sequence[str] | None]
) -> list[list[float]]:
    """Return the seconds per image of each sampler in each round; ``request`` are labels, seeds and captions."""
    works = [partial(sampler.sample, *request) for sampler in samplers]
    for work in works:  # compiles, and captures where there are graphs
        work()
    device = samplers[0].device
    by_round = [[timed(work, device) / len(request[1]) for work in works] for _ in range(rounds)]
    return [list(taken) for taken in zip(*by_round, strict=True)]


def ratio(times: Sequence[float], first: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, lowest and highest ratio of times to the first sampler's in the same rounds."""
    ratios = [time / other for time, other in zip(times, first, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def rows(results: Sequence[Result], taken: Sequence[Sequence[float]], own: SamplingConfig) -> list[Row]:
    """Join figures and times; ``own`` is how the model is sampled without options."""
    made = []
    for result, times in zip(results, taken, strict=True):
        point, fid, over = result.point, result.figure("fid"), ratio(times, taken[0])
        options = Point({"steps": point.sampling.steps}, point.sampling).beside(own).options
        if own.times is not None and "--times" not in options:
            options += ["--time-grid", point.sampling.time_grid.value]  # drops the model's times
        made.append(Row(point.name, options, to_dict(point.sampling), fid, statistics.median(times), over))
    ahead = [row for row in made if row.fid is not None and not any(_dominates(other, row) for other in made)]
    return [replace(row, front=row in ahead) for row in made]


def _dominates(one: Row, other: Row) -> bool:
    if one.fid is None or other.fid is None:
        return False
    first, second = (one.fid, one.seconds_per_image), (other.fid, other.seconds_per_image)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def tiers(made: Sequence[Row]) -> dict[str, str]:
    """Return the names of the rows that are called ``best``, ``balanced`` and ``fast``; empty if no FID is finite."""
    front = [(row.fid, row) for row in made if row.front and row.fid is not None]
    if not front:
        return {}
    lowest = min(fid for fid, _ in front)
    fastest = {
        tier: min((row for fid, row in front if fid <= factor * lowest), key=lambda row: row.seconds_per_image)
        for tier, factor in TIERS.items()
    }
    return {tier: row.name for tier, row in fastest.items()}


def values_of(made: Sequence[Row]) -> dict[str, Any]:
    """Return rows and tiers as JSON values."""
    return {"rows": [asdict(row) for row in made], "tiers": tiers(made)}


def offered(folder: Path, run: Path | None, average: str) -> list[Tier]:
    """Return the tiers of a checkpoint of ``run``, or of a model folder; empty if its weights do not have tiers."""
    if run is None:
        return read_tiers(folder / PARETO)
    path = run / FOLDER / PARETO
    return read_tiers(path, file_sha256(folder / weights_name(folder, average))) if path.is_file() else []


def read_tiers(path: Path, weights_sha256: str | None = None) -> list[Tier]:
    """Return the tiers in a file of ``pra bench pareto``; empty if the file is missing or of other weights.

    Raises:
        PraError: the file is damaged.
    """
    if not path.is_file():
        return []
    values = check_fields(read_json(path, finite=True), path, rows=list, tiers=dict, weights_sha256=str)
    if weights_sha256 not in (None, values["weights_sha256"]):
        return []
    by_name = {row.get("name"): row for row in values["rows"] if isinstance(row, dict)}
    found = []
    for tier in TIERS:
        if (name := values["tiers"].get(tier)) is None:
            continue
        row = by_name.get(name) if isinstance(name, str) else None
        kinds = {"options": tuple[str, ...], "sampling": dict, "fid": float, "seconds_per_image": PositiveFloat}
        row = check_fields(row, path, ratio=tuple[float, float, float], **kinds)
        try:
            sampling = from_dict(SamplingConfig, row["sampling"], f"sampling of {tier}")
        except PraError as error:
            raise unreadable(path, f"is damaged: {error}. {REPAIR}") from None
        found.append(Tier(tier, sampling, row["options"], row["fid"], row["seconds_per_image"], row["ratio"][0]))
    return found


def draw(made: Sequence[Row], title: str) -> Figure:
    """Draw FID over the seconds per image (logarithmic), the front as a line with the names of its tiers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    known = [(row.seconds_per_image, row.fid, row) for row in made if row.fid is not None]
    families = dict.fromkeys(row.sampling["solver"] for _, _, row in known)
    for solver in families:
        of_it = [(x, y) for x, y, row in known if row.sampling["solver"] == solver]
        axes.plot(*zip(*of_it, strict=True), "o", alpha=0.7, label=solver)
    front = sorted((x, y) for x, y, row in known if row.front)
    axes.plot(*zip(*front, strict=True) if front else ([], []), "-", color="#636363", lw=1, label="front")
    called: dict[str, list[str]] = {}
    for tier, name in tiers(made).items():
        called.setdefault(name, []).append(tier)
    for x, y, row in known:
        words = called.get(row.name, [])
        words += ["default"] if row is made[0] else []
        if words:
            axes.annotate(", ".join(words), (x, y), xytext=(4, 6), textcoords="offset points", fontsize=9)
    axes.set(xscale="log", xlabel="seconds per image", ylabel="FID", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure
