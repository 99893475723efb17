"""Requests to a sampler: settings and seeds in the forms that users give, and the images of a large set by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pra.config import SamplingConfig, Solver, from_dict, to_dict
from pra.method import noise
from pra.method.noise import Purpose

Seeds: TypeAlias = int | Sequence[int] | Tensor
"""One whole number of 64 bits per label."""


def changed_sampling(config: SamplingConfig, changes: dict[str, Any]) -> SamplingConfig:
    """Return settings with some of them changed, values as in :class:`SamplingConfig` or as in JSON.

    Another number of steps or another grid drops ``times``; new ``times`` drop the grid.

    Raises:
        PraError: no such setting (the nearest is given), or a value of the wrong type or range.
    """
    given = {name: to_dict(value.item() if isinstance(value, np.generic) else value) for name, value in changes.items()}
    settings, default = to_dict(config), to_dict(SamplingConfig())
    other_steps = given.get("steps", config.steps) != config.steps
    if isinstance(given.get("times"), list):
        settings |= {name: default[name] for name in ("time_grid", "shift")} | {"steps": len(given["times"]) - 1}
    elif other_steps or given.get("solver") == Solver.SHORTCUT.value or given.keys() & {"time_grid", "shift"}:
        settings["times"] = None
    return from_dict(SamplingConfig, settings | given, "sampling")


class Requests(Protocol):
    """The label and the seed of every image of a set, by its index, so that any part can be made anywhere."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def labels(self, indices: range) -> list[int]:
        """Return the classes of some images."""
        ...

    def seeds(self, indices: range) -> list[int]:
        """Return the seeds of some images."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Describe the set as plain JSON values, for its plan."""
        ...


@dataclass(frozen=True)
class Grid:
    """Every class with every seed, the seeds of a class one after the other."""

    chosen_labels: Sequence[int]
    chosen_seeds: Sequence[int]

    def __len__(self) -> int:
        return len(self.chosen_labels) * len(self.chosen_seeds)

    def labels(self, indices: range) -> list[int]:
        return [self.chosen_labels[index // len(self.chosen_seeds)] for index in indices]

    def seeds(self, indices: range) -> list[int]:
        return [self.chosen_seeds[index % len(self.chosen_seeds)] for index in indices]

    def to_json(self) -> dict[str, Any]:
        return {"labels": list(self.chosen_labels), "seeds": list(self.chosen_seeds)}


@dataclass(frozen=True)
class Listed:
    """Images with these labels; image ``i`` has seed ``i``. ``order`` says in words where the labels come from."""

    each: Sequence[int]
    order: str

    def __len__(self) -> int:
        return len(self.each)

    def labels(self, indices: range) -> list[int]:
        return [self.each[index] for index in indices]

    def seeds(self, indices: range) -> list[int]:
        return list(indices)

    def to_json(self) -> dict[str, Any]:
        return {"count": len(self.each), "labels": sorted(set(self.each)), "order": self.order}


@dataclass(frozen=True)
class Numbered:
    """``count`` images; image ``i`` has seed ``i``.

    The classes take turns, so that each has as many images (within one); with a ``label_seed`` each image's class is
    drawn uniformly, as a function of that seed and ``i``.
    """

    count: int
    classes: Sequence[int]
    label_seed: int | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def order(self) -> str:
        """Say how the classes are chosen."""
        return "in turn" if self.label_seed is None else f"random, seed {self.label_seed}"

    def labels(self, indices: range) -> list[int]:
        places = torch.tensor(indices) % len(self.classes)
        if self.label_seed is not None:
            keys = noise.fold(noise.keys(self.label_seed, torch.tensor(indices)), Purpose.LABEL)
            places = (noise.uniform(keys) * len(self.classes)).long()
        return [self.classes[place] for place in places.tolist()]

    def seeds(self, indices: range) -> list[int]:
        return list(indices)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "labels": list(self.classes), "order": self.order}
