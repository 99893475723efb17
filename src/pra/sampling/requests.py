"""Requests to a sampler: settings and seeds in the forms that users give, and the images of a large set by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pra.config import SamplingConfig, Solver, from_dict, to_dict
from pra.config.checks import PositiveInt, fit
from pra.errors import PraError
from pra.method import noise
from pra.method.noise import Purpose

Seeds: TypeAlias = int | Sequence[int] | Tensor
"""One whole number of 64 bits per label."""

MOST_IMAGES = 10**8
"""Most images of a set: its labels and seeds are lists in memory."""


def changed_sampling(config: SamplingConfig, changes: dict[str, Any]) -> SamplingConfig:
    """Return settings with some changes; values are as in :class:`SamplingConfig` or as in JSON.

    Another number of steps or another grid drops ``times``; new ``times`` drop the grid. ``times`` and ``raster_steps``
    set the number of steps, and drop each other.

    Raises:
        PraError: an unknown setting (the message gives the nearest), or a value of the wrong type or range.
    """
    given = {name: to_dict(value.item() if isinstance(value, np.generic) else value) for name, value in changes.items()}
    settings, default = to_dict(config), to_dict(SamplingConfig())
    other_steps = given.get("steps", config.steps) != config.steps
    if "steps" in given or isinstance(given.get("times"), list):
        settings["raster_steps"] = None
    if isinstance(given.get("times"), list):
        settings |= {name: default[name] for name in ("time_grid", "shift")} | {"steps": len(given["times"]) - 1}
    elif given.get("raster_steps"):
        counts = fit(tuple[PositiveInt, ...], given["raster_steps"], "sampling.raster_steps")
        settings |= {"steps": max(counts), "times": None}
    elif other_steps or given.get("solver") == Solver.SHORTCUT.value or given.keys() & {"time_grid", "shift"}:
        settings["times"] = None
    return from_dict(SamplingConfig, settings | given, "sampling")


@dataclass(frozen=True)
class Requests:
    """The label and the seed of each image of a set, and ``plan``, which describes them as plain JSON values.

    ``captions`` holds one caption per image, as the model reads it, or is ``None``.
    """

    labels: Sequence[int]
    seeds: Sequence[int]
    plan: dict[str, Any]
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: range) -> tuple[Sequence[int], Sequence[int], Sequence[str] | None]:
        """Return the labels, seeds and captions of some images, as :meth:`pra.Sampler.sample` takes them."""
        where = slice(indices.start, indices.stop)
        return self.labels[where], self.seeds[where], self.captions and self.captions[where]


def grid(labels: Sequence[int], seeds: Sequence[int], captions: Sequence[str] | None = None) -> Requests:
    """Request every class with every seed, the seeds of a class one after the other.

    ``captions`` gives one caption for each of ``labels``; then every such pair is requested with every seed.
    """
    _check_count(len(labels) * len(seeds))
    places = [place for place in range(len(labels)) for _ in seeds]
    plan = {"labels": [*labels], "seeds": [*seeds]}
    return _requests(places, labels, [*seeds] * len(labels), plan, captions)


def listed(labels: Sequence[int], order: str, captions: Sequence[str] | None = None) -> Requests:
    """Request images of these labels; image ``i`` has seed ``i``. ``order`` says where the labels come from."""
    plan = {"count": len(labels), "labels": sorted(set(labels)), "order": order}
    return Requests(labels, range(len(labels)), plan, captions)


def numbered(
    count: int, classes: Sequence[int], label_seed: int | None = None, captions: Sequence[str] | None = None
) -> Requests:
    """Request ``count`` images; image ``i`` has seed ``i``.

    The classes take turns, so their numbers of images differ by at most one. With a ``label_seed`` each image's class
    is drawn uniformly, as a function of this seed and ``i``. ``captions`` gives one caption for each of ``classes``;
    then such pairs take the place of classes.
    """
    _check_count(count)
    indices, order = torch.arange(count), "in turn"
    places = indices % len(classes)
    if label_seed is not None:
        order = f"random, seed {label_seed}"
        places = (noise.uniform(noise.fold(noise.keys(label_seed, indices), Purpose.LABEL)) * len(classes)).long()
    plan = {"count": count, "labels": [*classes], "order": order}
    return _requests(places.tolist(), classes, range(count), plan, captions)


def _requests(
    places: Sequence[int],
    labels: Sequence[int],
    seeds: Sequence[int],
    plan: dict[str, Any],
    captions: Sequence[str] | None,
) -> Requests:
    each = [labels[place] for place in places]
    if captions is None:
        return Requests(each, seeds, plan)
    return Requests(each, seeds, plan | {"captions": [*captions]}, [captions[place] for place in places])


def _check_count(count: int) -> None:
    if count > MOST_IMAGES:
        problem = f"{count:,} images are more than {MOST_IMAGES:,}. Make them in several commands"
        raise PraError(problem, code="too-large", value=count)
