"""Seconds per image of a study's settings, timed in turn in one session, beside their FIDs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pra.bench.pareto import in_turn, ratio
from pra.models import weights
from pra.sampling import Sampler
from studies.measures import Quality, Row
from studies.records import TIMED, Records
from studies.run import Job, Workplace

TOGETHER, ROUNDS = 16, 21
"""Images of a batch whose time is measured, and how often each setting has its turn."""


def add_times(jobs: Sequence[Job], records: Records, place: Workplace) -> None:
    """Add ``seconds_per_image`` and ``time_ratio``, the median over rounds of the time over the first job's.

    Args:
        jobs: of one setting and seed, the default first; those without rows are left out. Nothing is timed if the
            first has no row, or if all rows have their times.
        records: of the study, to be changed.
        place: where the runs lie. A missing run is trained again.
    """
    rows = {_name(row): row for row in records.rows}
    known = [(job, rows[_name(job.labels)]) for job in jobs if _name(job.labels) in rows]
    if not known or known[0][0] is not jobs[0] or all(name in row for _, row in known for name in TIMED):
        return
    taken = in_turn([_sampler(job, place) for job, _ in known], ROUNDS, ([0] * TOGETHER, range(TOGETHER), None))
    records.replace(
        row | {"seconds_per_image": statistics.median(times), "time_ratio": ratio(times, taken[0])[0]}
        for (_, row), times in zip(known, taken, strict=True)
    )


def _name(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("setting", "scale", "value", "seed"))


def _sampler(job: Job, place: Workplace) -> Sampler:
    (measure,) = job.measures
    assert isinstance(measure, Quality), "what is timed is how images are sampled"
    return Sampler(weights.load(place.train(job), device=place.device), measure.sampling)
