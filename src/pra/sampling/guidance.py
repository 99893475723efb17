"""The reach of guidance: along the raster, and along the flow's time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from pra.config import GuidanceSchedule, SamplingConfig, Solver
from pra.sampling import solvers

MODULATED_ROWS = 1024
"""Rows whose modulations are computed together: enough to fill a device, few enough to stay in its cache."""


def scale_at(config: SamplingConfig, position: int, patches: int) -> float:
    """Return the guidance scale at one of ``patches`` raster positions, within the guidance interval."""
    if config.schedule is GuidanceSchedule.CONSTANT:
        return config.guidance
    return 1.0 + (config.guidance - 1.0) * position / (patches - 1)


@dataclass(frozen=True)
class Plan:
    """The evaluations that need the unconditional field: those in the guidance interval whose scale is not 1.

    ``times`` are the times of the evaluations at one position, in order. With ``told``, the head reads the scale and
    never needs the unconditional field.
    """

    config: SamplingConfig
    patches: int
    times: Sequence[float]
    told: bool = False

    @classmethod
    def of_head(cls, config: SamplingConfig, patches: int, told: bool = False) -> Plan:
        """Plan a head's evaluations at ``patches`` raster positions, each with ``config.steps`` steps."""
        grid = solvers.grid_of(config)
        return cls(config, patches, solvers.evaluation_times(config.solver, grid.tolist()), told)

    def within(self) -> tuple[bool, ...]:
        """Return for each evaluation whether it needs both fields where the scale is not 1."""
        low, high = torch.tensor(self.config.guidance_interval, device="cpu").tolist()  # float32, as the times are
        return tuple(low <= t <= high and not self.told for t in self.times)

    def guided(self, position: int) -> bool:
        """Return whether any evaluation at a raster position is guided."""
        return scale_at(self.config, position, self.patches) != 1.0 and any(self.within())

    def scale(self, position: int, device: torch.device) -> Tensor | None:
        """Return the guidance scale at a raster position as a float32 scalar; ``None`` where nothing is guided."""
        if not self.guided(position):
            return None
        scale = scale_at(self.config, position, self.patches)
        return torch.full((), scale if scale <= torch.finfo(torch.float32).max else math.inf, device=device)

    def streams(self, guided: bool) -> tuple[int, ...]:
        """Return 1 or 2 for each evaluation at a position that is guided or not."""
        return tuple(2 if guided and inside else 1 for inside in self.within())

    def groups(self, guided: bool, batch: int) -> Iterator[tuple[int, int, int]]:
        """Yield ``(first, end, streams)`` of groups of evaluations whose modulations are computed together."""
        first = 0
        for streams, members in groupby(self.streams(guided)):
            end, most = first + len(list(members)), max(1, MODULATED_ROWS // (streams * batch))
            for start in range(first, end, most):
                yield start, min(start + most, end), streams
            first = end

    @property
    def span(self) -> float | None:
        """The length of every step where the head gives mean velocities over steps, else None."""
        return 1.0 / self.config.steps if self.config.solver is Solver.SHORTCUT else None

    @property
    def most(self) -> int:
        """The number of the backbone's streams: 2 if any evaluation at any position is guided."""
        return 2 if self.config.guidance != 1.0 and any(self.within()) else 1


class Evaluations:
    """The head's evaluations at the raster positions ``places``, which take the same number of ``steps``.

    ``times`` are on the device, and ``embedded`` are their embeddings by the head. :class:`Plan` describes the rest.
    """

    def __init__(self, plan: Plan, places: Sequence[int], batch: int, device: torch.device) -> None:
        self.plan, self.places, self.steps = plan, places, plan.config.steps
        self.within = plan.within()
        self.groups = {guided: list(plan.groups(guided, batch)) for guided in (False, True)}
        self.grid: list[float] = solvers.grid_of(plan.config).tolist()
        self.times = torch.tensor(plan.times, device=device)
        self.embedded: Tensor | None = None

    def positions(self) -> Counter[bool]:
        """Count the positions that are guided, and those that are not."""
        return Counter(map(self.plan.guided, self.places))


def mean_steps(config: SamplingConfig, patches: int) -> float:
    """Return the mean number of steps of the raster positions."""
    return sum(config.steps_at(position, patches) for position in range(patches)) / patches


def plans(config: SamplingConfig, patches: int, told: bool = False) -> dict[int, Plan]:
    """Plan a head's evaluations for each number of steps that occurs along the raster."""
    alone = replace(config, raster_steps=None)
    counts = dict.fromkeys(config.steps_at(position, patches) for position in range(patches))
    return {count: Plan.of_head(replace(alone, steps=count), patches, told) for count in counts}


def evaluations_by_steps(
    config: SamplingConfig, patches: int, batch: int, device: torch.device, told: bool
) -> dict[int, Evaluations]:
    """Return the head's evaluations by number of steps, for a batch of ``batch`` images."""
    places: dict[int, list[int]] = {}
    for position in range(patches):
        places.setdefault(config.steps_at(position, patches), []).append(position)
    found = plans(config, patches, told)
    return {count: Evaluations(found[count], where, batch, device) for count, where in places.items()}
