"""A study's rows by system, over seeds and guidance scales."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from studies.measures import Row


@dataclass(frozen=True)
class Group:
    """A system (at one value, where the study varies one) over its seeds, at its best guidance.

    The best guidance is the one with the lowest mean FID over the seeds. ``spread`` is the standard deviation over
    the seeds, None for a single one.
    """

    system: str
    value: Any
    guidance: float
    fid: float
    spread: float | None
    seeds: int
    by_guidance: dict[float, list[float]]
    rows: list[Row]

    @property
    def best(self) -> list[float]:
        """FID of each seed at the best guidance."""
        return self.by_guidance[self.guidance]

    @property
    def by_seed(self) -> dict[int, Row]:
        """The rows at the best guidance by seed."""
        return {row["seed"]: row for row in sorted(self.at(self.guidance), key=lambda row: row["seed"])}

    @property
    def judges(self) -> list[str]:
        """The judges at the best guidance; with several judges, the spread includes theirs."""
        return sorted({row.get("judge", "") for row in self.at(self.guidance)})

    def at(self, guidance: float) -> list[Row]:
        """The rows with an FID at one guidance, one per seed."""
        return [row for row in self.rows if "fid" in row and row["guidance"] == guidance]

    def mean(self, column: str, guidance: float | None = None) -> float | None:
        """Return the mean over the rows that have the column, with ``guidance`` over its rows only."""
        rows = self.rows if guidance is None else self.at(guidance)
        values = [row[column] for row in rows if isinstance(row.get(column), int | float)]
        return statistics.mean(values) if values else None


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows with an FID by system and value, in order of first appearance."""
    found: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        found.setdefault((row["system"], row.get("value", "")), []).append(row)
    made = []
    for (system, value), members in found.items():
        judged = [row for row in members if "fid" in row and "guidance" in row]  # real images have no guidance
        if not judged:
            continue
        by_guidance: dict[float, list[Row]] = {}
        for row in judged:
            by_guidance.setdefault(row["guidance"], []).append(row)
        # A guidance at which some seeds are not judged yet would win or lose by the seeds it has.
        most = max(len(members) for members in by_guidance.values())
        whole = {guidance: members for guidance, members in by_guidance.items() if len(members) == most}
        best = min(whole, key=lambda guidance: statistics.mean(row["fid"] for row in whole[guidance]))
        fids = [row["fid"] for row in whole[best]]
        made.append(
            Group(
                system=system,
                value=value,
                guidance=best,
                fid=statistics.mean(fids),
                spread=statistics.stdev(fids) if len(fids) > 1 else None,
                seeds=len(fids),
                by_guidance={at: [row["fid"] for row in whole[at]] for at in sorted(whole)},
                rows=members,
            )
        )
    return made
