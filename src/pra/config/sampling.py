"""Settings of the sampler."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from dataclasses import dataclass
from typing import Annotated

from pra.config.checks import NaturalFloat, PositiveFloat, Settings, Share, positive, within, wrong
from pra.config.model import AnyModelConfig


class GuidanceSchedule(enum.Enum):
    """The guidance scale along the raster: the same everywhere, or rising linearly from 1."""

    CONSTANT = "constant"
    LINEAR = "linear"


class Solver(enum.Enum):
    """How the head's ODE (or, for Euler-Maruyama, SDE) is integrated; see :mod:`pra.sampling.solvers`."""

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
    """How an image is sampled. ``guidance`` 1 is off; ``steps`` counts solver intervals, not evaluations.

    Guidance acts only at flow times within ``guidance_interval`` (0 is noise, 1 data; ends included; arXiv 2404.07724).
    ``shift`` above 1 moves the times of the grid towards noise (arXiv 2403.03206). ``times`` replaces both by a grid of
    ``steps + 1`` numbers (:mod:`pra.sampling.learnt_grid`).
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
    deblock: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.0, self.guidance_interval[1])(self.guidance_interval[0], "guidance_interval")
        if self.times is not None:
            self._check_times(self.times)

    @property
    def adds_noise(self) -> bool:
        """Whether the solver integrates an SDE, which draws noise in every interval."""
        return self.solver is Solver.EULER_MARUYAMA

    def with_steps(self, steps: int) -> SamplingConfig:
        """Return a copy with another number of steps, without ``times``, which fit one number of steps."""
        return dataclasses.replace(self, steps=steps, times=self.times if steps == self.steps else None)

    def _check_times(self, times: tuple[float, ...]) -> None:
        given = ",".join(f"{t:g}" for t in times)
        rising = all(low < high for low, high in itertools.pairwise(times))
        if len(times) != self.steps + 1 or not rising or (times[0], times[-1]) != (0.0, 1.0):
            problem = f"must be steps + 1 = {self.steps + 1} numbers rising from 0 to 1"
            raise wrong("times", given, problem, "invalid")
        if self.time_grid is not TimeGrid.UNIFORM or self.shift != 1.0:
            problem = f"leave out time_grid {self.time_grid.value} and shift {self.shift:g}"
            raise wrong("times", given, f"are the grid themselves: {problem}")


def check_sampling(model: AnyModelConfig, sampling: SamplingConfig) -> None:
    """Refuse settings that a model cannot be sampled with."""
    if not model.autoregressive and sampling.schedule is GuidanceSchedule.LINEAR:
        problem = f"rises along the raster, and {model.name} makes all patches at once. Use the schedule constant"
        raise wrong("schedule", "linear", problem, "unsupported")
    if sampling.solver is not Solver.SHORTCUT:
        return
    if not model.has_shortcut:
        fix = "Add one with `pra distill RUN` (model.head.shortcut=true), or use another solver"
        raise wrong("solver", "shortcut", f"needs a second head, which this model does not have. {fix}", "unsupported")
    found = [] if sampling.steps in SHORTCUT_STEPS else [f"steps {sampling.steps}"]
    if sampling.times is not None:
        found = ["times"]
    if sampling.time_grid is not TimeGrid.UNIFORM:
        found.append(f"time_grid {sampling.time_grid.value}")
    if sampling.shift != 1.0:
        found.append(f"shift {sampling.shift:g}")
    if found:
        known = ", ".join(map(str, SHORTCUT_STEPS))
        raise wrong("solver", "shortcut", f"takes {known} equal steps, not {', '.join(found)}")
