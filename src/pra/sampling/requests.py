"""Requests to a sampler: settings and seeds in the forms that users give, and the images of a large set by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

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


class Requests:
    """The label and the seed of every image of a set, by its index, so that any part can be made anywhere.

    ``asked`` describes the set as JSON values, for its plan.
    """

    def __init__(self, labels: Sequence[int], seeds: Sequence[int], asked: dict[str, Any]) -> None:
        self._labels, self._seeds, self._asked = labels, seeds, asked

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, indices: range) -> list[int]:
        """Return the classes of some images."""
        return [self._labels[index] for index in indices]

    def seeds(self, indices: range) -> list[int]:
        """Return the seeds of some images."""
        return [self._seeds[index] for index in indices]

    def to_json(self) -> dict[str, Any]:
        """Describe the set as plain JSON values."""
        return self._asked


class Grid(Requests):
    """Every class with every seed, the seeds of a class one after the other."""

    def __init__(self, labels: Sequence[int], seeds: Sequence[int]) -> None:
        self.chosen_labels, self.chosen_seeds = labels, seeds
        every = [label for label in labels for _ in seeds]
        super().__init__(every, [*seeds] * len(labels), {"labels": list(labels), "seeds": list(seeds)})


class Listed(Requests):
    """Images with these labels; image ``i`` has seed ``i``. ``order`` says in words where the labels come from."""

    def __init__(self, labels: Sequence[int], order: str, classes: Sequence[int] | None = None) -> None:
        self.order = order
        classes = sorted(set(labels)) if classes is None else list(classes)
        asked = {"count": len(labels), "labels": classes, "order": order}
        super().__init__(labels, range(len(labels)), asked)


class Numbered(Listed):
    """``count`` images; image ``i`` has seed ``i``.

    The classes take turns, so that each has as many images (within one); with a ``label_seed`` each image's class is
    drawn uniformly, as a function of that seed and ``i``.
    """

    def __init__(self, count: int, classes: Sequence[int], label_seed: int | None = None) -> None:
        places, order = (torch.arange(count) % len(classes)), "in turn"
        if label_seed is not None:
            keys = noise.fold(noise.keys(label_seed, torch.arange(count)), Purpose.LABEL)
            places, order = (noise.uniform(keys) * len(classes)).long(), f"random, seed {label_seed}"
        super().__init__([classes[place] for place in places.tolist()], order, classes)
