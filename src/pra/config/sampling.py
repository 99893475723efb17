"""Settings of the sampler."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from dataclasses import dataclass

from pra.config.checks import between, coerce, positive
from pra.config.model import AnyModelConfig
from pra.errors import PraError


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
"""Into how many equal steps a head with shortcuts learns to take the path."""


LARGEST_STEPS = 10_000
"""Beyond this the times of a grid in float32 need not rise."""


class TimeGrid(enum.Enum):
    """Where the solver's intervals lie between noise (0) and data (1); see :func:`pra.sampling.solvers.time_grid`."""

    UNIFORM = "uniform"
    COSINE = "cosine"
    LOGIT_NORMAL = "logit-normal"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an image is sampled. ``guidance`` 1 is none; ``steps`` counts solver intervals, not evaluations.

    Guidance acts at flow times within ``guidance_interval`` (0 is noise, 1 data; both ends belong to it), elsewhere
    there is none (arXiv 2404.07724). ``shift`` beyond 1 moves the times of the grid towards noise (arXiv 2403.03206).
    ``times`` are a grid of one's own in place of both, ``steps + 1`` of them (:mod:`pra.sampling.learnt_grid`).
    """

    guidance: float = 1.0
    schedule: GuidanceSchedule = GuidanceSchedule.CONSTANT
    solver: Solver = Solver.MIDPOINT
    steps: int = 3
    temperature: float = 1.0
    renormalise: bool = True
    time_grid: TimeGrid = TimeGrid.UNIFORM
    shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "steps", "shift")
        between(self, "steps", 1, LARGEST_STEPS)
        between(self, "guidance", 0.0, math.inf)
        between(self, "temperature", 0.0, math.inf)
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise PraError(f"guidance_interval must be two times 0 <= low <= high <= 1, got {low:g} and {high:g}")
        if self.times is not None:
            self._check_times(self.times)

    @property
    def adds_noise(self) -> bool:
        """Whether the solver is that of an SDE, which draws noise in every interval."""
        return self.solver is Solver.EULER_MARUYAMA

    def with_steps(self, steps: int) -> SamplingConfig:
        """The same in another number of steps; ``times`` are of one number of them, and go with it."""
        return dataclasses.replace(self, steps=steps, times=self.times if steps == self.steps else None)

    def _check_times(self, times: tuple[float, ...]) -> None:
        rising = all(low < high for low, high in itertools.pairwise(times))
        if len(times) != self.steps + 1 or not rising or (times[0], times[-1]) != (0.0, 1.0):
            given = ",".join(f"{t:g}" for t in times)
            raise PraError(f"times must be steps + 1 = {self.steps + 1} numbers rising from 0 to 1, got {given}")
        if self.time_grid is not TimeGrid.UNIFORM or self.shift != 1.0:
            raise PraError(
                f"times are the grid themselves: leave out time_grid {self.time_grid.value} and shift {self.shift:g}"
            )


def check_sampling(model: AnyModelConfig, sampling: SamplingConfig) -> None:
    """Whether a model can be sampled this way.

    Raises:
        PraError: it cannot.
    """
    if not model.autoregressive and sampling.schedule is GuidanceSchedule.LINEAR:
        raise PraError(
            f"the guidance schedule linear rises along the raster, and {model.name} makes all patches at once; "
            "take the schedule constant"
        )
    if sampling.solver is not Solver.SHORTCUT:
        return
    if not model.has_shortcut:
        raise PraError(
            "the solver shortcut needs a second head, which this model has not: `pra distill RUN` gives a trained run "
            "one (model.head.shortcut=true); or take another solver"
        )
    wrong = [] if sampling.steps in SHORTCUT_STEPS else [f"steps {sampling.steps}"]
    if sampling.times is not None:
        wrong = ["times of one's own"]
    if sampling.time_grid is not TimeGrid.UNIFORM:
        wrong.append(f"time_grid {sampling.time_grid.value}")
    if sampling.shift != 1.0:
        wrong.append(f"shift {sampling.shift:g}")
    if wrong:
        known = ", ".join(map(str, SHORTCUT_STEPS))
        raise PraError(
            f"the solver shortcut takes {known} equal steps, which is what the head has learnt; not {', '.join(wrong)}"
        )
