"""What is asked of a sampler, in the forms that people give it: settings by name, classes by number or by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pra.config import SamplingConfig, Solver, from_dict, to_dict
from pra.errors import PraError, nearest

Labels: TypeAlias = int | str | Sequence[int | str] | Tensor
"""Classes by number or name; one alone is a batch of one."""

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


def label_numbers(labels: Labels, classes: Sequence[str]) -> Tensor:
    """Classes by number or name as ``(B,)`` int64 on the CPU; whether the numbers are in range is not looked at.

    Raises:
        PraError: a name that no class has (the nearest is given), or what is neither a name nor a whole number.
    """
    return _integers(
        [_number_of(label, classes) if isinstance(label, str) else label for label in _listed(labels)],
        "labels must be whole numbers of 64 bits or names of classes",
    )


def seed_numbers(seeds: Seeds) -> Tensor:
    """Seeds as ``(B,)`` int64 on the CPU, nothing rounded and nothing wrapped.

    Raises:
        PraError: they are no whole numbers of 64 bits.
    """
    return _integers(_listed(seeds), "seeds must be whole numbers of 64 bits")


def _number_of(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise PraError(f"no class {name!r}{nearest(name, classes)}")
    return classes.index(name)


def _listed(values: Any) -> list[Any]:
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def _integers(values: list[Any], expected: str) -> Tensor:
    try:
        return torch.tensor([operator.index(value) for value in values], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise PraError(f"{expected}, got {' '.join(repr(values).split())[:200]}") from None
