"""Settings of the sampler."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from dataclasses import dataclass
from typing import Annotated

from pra.config.checks import NaturalFloat, PositiveFloat, PositiveInt, Settings, Share, positive, within, wrong
from pra.config.model import AnyModelConfig


class GuidanceSchedule(enum.Enum):
    """The guidance scale along the raster: the same everywhere, or rising linearly from 1."""

    CONSTANT = "constant"
    LINEAR = "linear"


class Solver(enum.Enum):
    """Solver of the head's ODE (for Euler-Maruyama, SDE); see :mod:`pra.sampling.solvers`."""

    EULER = "euler"
    MIDPOINT = "midpoint"
    HEUN = "heun"
    EULER_MARUYAMA = "euler-maruyama"
    ADAMS_BASHFORTH = "adams-bashforth"
    DPM = "dpm"
    SHORTCUT = "shortcut"


SHORTCUT_STEPS = (1, 2, 4, 8)
"""Numbers of equal steps that a head with shortcuts learns."""


LARGEST_STEPS = 10_000
"""Largest number of steps: beyond it, neighbouring times of a grid may be equal in float32."""


class TimeGrid(enum.Enum):
    """Places of the solver's intervals between noise (0) and data (1); see :func:`pra.sampling.solvers.time_grid`."""

    UNIFORM = "uniform"
    COSINE = "cosine"
    LOGIT_NORMAL = "logit-normal"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """Settings of the sampler. ``guidance`` 1 is off; ``steps`` counts solver intervals, not evaluations.

    Guidance acts only at flow times within ``guidance_interval`` (0 is noise, 1 data; ends included; arXiv 2404.07724).
    ``shift`` above 1 moves the times of the grid towards noise (arXiv 2403.03206). ``times`` replaces both by a grid of
    ``steps + 1`` numbers (:mod:`pra.sampling.learnt_grid`).
    ``raster_steps`` are numbers of steps for equal stretches of the raster, and ``steps`` is the largest of them: 4,2,1
    takes 4 in its first third, 2 in the next and 1 in the last (arXiv 2505.20297: early patches need more).
    ``deblock`` applies the model's deblocking filter, if it has one, to the finished picture.
    """

    guidance: NaturalFloat = 1.0
    schedule: GuidanceSchedule = GuidanceSchedule.CONSTANT
    solver: Solver = Solver.MIDPOINT
    steps: Annotated[int, positive, within(1, LARGEST_STEPS)] = 3
    temperature: NaturalFloat = 1.0
    renormalise: bool = True
    time_grid: TimeGrid = TimeGrid.UNIFORM
    shift: PositiveFloat = 1.0
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    times: tuple[float, ...] | None = None
    raster_steps: tuple[PositiveInt, ...] | None = None
    deblock: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.0, self.guidance_interval[1])(self.guidance_interval[0], "guidance_interval")
        if self.times is not None:
            self._check_times(self.times)
        if self.raster_steps is not None:
            self._check_raster(self.raster_steps)

    @property
    def adds_noise(self) -> bool:
        """Whether the solver integrates an SDE, which draws noise in every interval."""
        return self.solver is Solver.EULER_MARUYAMA

    def with_steps(self, steps: int) -> SamplingConfig:
        """Return a copy with another number of steps everywhere, without ``times`` and ``raster_steps``."""
        return self if steps == self.steps else dataclasses.replace(self, steps=steps, times=None, raster_steps=None)

    def steps_at(self, position: int, patches: int) -> int:
        """Return the number of steps at one of ``patches`` raster positions."""
        counts = self.raster_steps or (self.steps,)
        return counts[position * len(counts) // patches]

    @property
    def steps_in_words(self) -> str:
        """Return ``"3"``, or ``"4, 2, 1 (along the raster)"``."""
        if self.raster_steps is None:
            return str(self.steps)
        return f"{', '.join(map(str, self.raster_steps))} (along the raster)"

    def _check_times(self, times: tuple[float, ...]) -> None:
        given = ",".join(f"{t:g}" for t in times)
        rising = all(low < high for low, high in itertools.pairwise(times))
        if len(times) != self.steps + 1 or not rising or (times[0], times[-1]) != (0.0, 1.0):
            problem = f"must be steps + 1 = {self.steps + 1} numbers rising from 0 to 1"
            raise wrong("times", given, problem, "invalid")
        if self.time_grid is not TimeGrid.UNIFORM or self.shift != 1.0:
            problem = f"leave out time_grid {self.time_grid.value} and shift {self.shift:g}"
            raise wrong("times", given, f"are the grid themselves: {problem}")

    def _check_raster(self, counts: tuple[int, ...]) -> None:
        given = ",".join(map(str, counts))
        if not counts or max(counts) != self.steps:
            fix = f"Set steps to {max(counts, default=1)} as well"
            problem = f"must have steps {self.steps} as the largest number. {fix}"
            raise wrong("raster_steps", given or "()", problem)
        if self.times is not None:
            raise wrong("raster_steps", given, "do not go with times, which are for one number of steps. Leave one out")


def check_sampling(model: AnyModelConfig, sampling: SamplingConfig) -> None:
    """Refuse settings that a model cannot be sampled with."""
    if not model.autoregressive and sampling.schedule is GuidanceSchedule.LINEAR:
        problem = f"rises along the raster, and {model.name} makes all patches at once. Use the schedule constant"
        raise wrong("schedule", "linear", problem, "unsupported")
    counts = sampling.raster_steps or (sampling.steps,)
    if sampling.raster_steps is not None:
        given = ",".join(map(str, counts))
        if not model.autoregressive:
            problem = f"change along the raster, and {model.name} makes all patches at once. Use steps"
            raise wrong("raster_steps", given, problem, "unsupported")
        if len(counts) > model.num_groups:
            problem = f"are {len(counts)} numbers for {model.num_groups} raster positions. Give at most one for each"
            raise wrong("raster_steps", given, problem)
    if sampling.solver is not Solver.SHORTCUT:
        return
    if not model.has_shortcut:
        fix = "Add one with `pra distill RUN` (model.head.shortcut=true), or use another solver"
        raise wrong("solver", "shortcut", f"needs a second head, which this model does not have. {fix}", "unsupported")
    if (most := model.shortcut_guidance) is not None:
        if not 1 <= sampling.guidance <= most:
            problem = (
                f"is not among the scales 1 to {most:g} that the second head has learnt. Use one, or another solver"
            )
            raise wrong("guidance", f"{sampling.guidance:g}", problem)
        if sampling.guidance_interval != (0.0, 1.0):
            given = ",".join(f"{t:g}" for t in sampling.guidance_interval)
            raise wrong("guidance_interval", given, "does not go with guided steps of the second head. Use 0,1")
    found = [f"steps {count}" for count in dict.fromkeys(counts) if count not in SHORTCUT_STEPS]
    if sampling.times is not None:
        found = ["times"]
    if sampling.time_grid is not TimeGrid.UNIFORM:
        found.append(f"time_grid {sampling.time_grid.value}")
    if sampling.shift != 1.0:
        found.append(f"shift {sampling.shift:g}")
    if found:
        known = ", ".join(map(str, SHORTCUT_STEPS))
        raise wrong("solver", "shortcut", f"takes {known} equal steps, not {', '.join(found)}")
