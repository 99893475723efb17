"""What is asked of a sampler, in the forms that people give it: settings by name, seeds as numbers of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from pra.config import SamplingConfig, Solver, from_dict, to_dict
from pra.models.condition import integers

Seeds: TypeAlias = int | Sequence[int] | Tensor
"""One whole number of 64 bits per label."""


def changed_sampling(config: SamplingConfig, changes: dict[str, Any]) -> SamplingConfig:
    """Settings with some of them changed, values as in :class:`SamplingConfig` or as JSON has them.

    Of the old grid goes what has no meaning under the change: ``times`` with another number of steps or another grid,
    the grid with new ``times``.

    Raises:
        PraError: no such setting (the nearest is given), or a value of the wrong type or range.
    """
    if not changes:
        return config
    given = {name: to_dict(value.item() if isinstance(value, np.generic) else value) for name, value in changes.items()}
    settings, default = to_dict(config), to_dict(SamplingConfig())
    other_steps = given.get("steps", config.steps) != config.steps
    if isinstance(given.get("times"), list):
        settings |= {name: default[name] for name in ("time_grid", "shift")} | {"steps": len(given["times"]) - 1}
    elif other_steps or given.get("solver") == Solver.SHORTCUT.value or given.keys() & {"time_grid", "shift"}:
        settings["times"] = None
    return from_dict(SamplingConfig, settings | given, "sampling")


def seed_numbers(seeds: Seeds) -> Tensor:
    """Seeds as ``(B,)`` int64 on the CPU, nothing rounded and nothing wrapped.

    Raises:
        PraError: they are no whole numbers of 64 bits.
    """
    return integers(seeds, "seeds must be whole numbers of 64 bits")
