"""Systems compared seed by seed: runs of one seed share the order of the data and the noise of sampling."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from studies.groups import Group
from studies.ladder import FAITHFUL


@dataclass(frozen=True)
class Paired:
    """A group beside the reference, seed by seed.

    ``differences`` are the FID of ``group`` minus the reference's, by seed, each at its own best guidance. Seeds count
    if the same judge has measured both.
    """

    group: Group
    differences: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean of the differences; nan without any."""
        return statistics.mean(self.differences.values()) if self.differences else math.nan

    @property
    def spread(self) -> float | None:
        """The sample standard deviation of the differences; None for less than two."""
        return statistics.stdev(self.differences.values()) if len(self.differences) > 1 else None

    @property
    def p(self) -> float | None:
        """The two-sided p-value of a paired t-test; None if the spread is unknown or 0."""
        if not self.spread:
            return None
        count = len(self.differences)
        return two_sided(self.mean / (self.spread / math.sqrt(count)), count - 1)


def paired(of: Iterable[Group], reference: Group) -> list[Paired]:
    """Return the pairs of every other group with the reference."""
    own = reference.by_seed

    def differences(group: Group) -> dict[int, float]:
        both = [(seed, row, own[seed]) for seed, row in group.by_seed.items() if seed in own]
        return {seed: row["fid"] - other["fid"] for seed, row, other in both if row.get("judge") == other.get("judge")}

    return [Paired(group, differences(group)) for group in of if group is not reference]


def two_sided(t: float, freedom: int) -> float:
    """Return the probability that Student's t with ``freedom`` degrees lies further from 0 than ``t``.

    Uses the finite series for whole degrees (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = 1.0, 0.0
    for step in range(freedom // 2):
        total += term
        term *= square * (2 * step + 1 + odd) / (2 * step + 2 + odd)
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within * math.cos(angle))
    return max(0.0, 1.0 - within)


def unchanged(of: Iterable[Group]) -> Group | None:
    """The unchanged PRA among its variants, in the studies `ablation` and `recipe`."""
    return next((group for group in of if group.value in ("PRA", FAITHFUL)), None)
