"""Which images are asked for: the label and the seed of each, by its index, so that any part can be made anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pra.method import noise
from pra.method.noise import Purpose


class Requests(Protocol):
    """So many images, each with a label and a seed that depend on its index alone."""

    def __len__(self) -> int:
        """Images in all."""
        ...

    def labels(self, indices: range) -> list[int]:
        """The classes of some of them."""
        ...

    def seeds(self, indices: range) -> list[int]:
        """The seeds of some of them."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What is asked for, as plain JSON values."""
        ...


@dataclass(frozen=True)
class Grid:
    """Every class with every seed, the seeds of a class one after the other."""

    chosen_labels: tuple[int, ...]
    chosen_seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen_labels) * len(self.chosen_seeds)

    def labels(self, indices: range) -> list[int]:
        """The classes of some images."""
        return [self.chosen_labels[index // len(self.chosen_seeds)] for index in indices]

    def seeds(self, indices: range) -> list[int]:
        """The seeds of some images."""
        return [self.chosen_seeds[index % len(self.chosen_seeds)] for index in indices]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"labels": list(self.chosen_labels), "seeds": list(self.chosen_seeds)}


@dataclass(frozen=True)
class Listed:
    """Images with these labels, of which number ``i`` has seed ``i``; ``order`` says in words where they come from."""

    each: tuple[int, ...]
    order: str

    def __len__(self) -> int:
        return len(self.each)

    def labels(self, indices: range) -> list[int]:
        """The classes of some images."""
        return [self.each[index] for index in indices]

    def seeds(self, indices: range) -> list[int]:
        """The seeds of some images: their numbers."""
        return list(indices)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"count": len(self.each), "labels": sorted(set(self.each)), "order": self.order}


@dataclass(frozen=True)
class Numbered:
    """``count`` images, of which number ``i`` has seed ``i``.

    The classes take turns, so that each has as many images (within one); with a ``label_seed`` each image's class is
    drawn uniformly, as a function of that seed and ``i``.
    """

    count: int
    classes: tuple[int, ...]
    label_seed: int | None = None

    def __len__(self) -> int:
        return self.count

    def labels(self, indices: range) -> list[int]:
        """The classes of some images."""
        if self.label_seed is None:
            return [self.classes[index % len(self.classes)] for index in indices]
        keys = noise.fold(noise.keys(self.label_seed, torch.tensor(indices)), Purpose.LABEL)
        return [self.classes[int(place)] for place in (noise.uniform(keys) * len(self.classes)).long()]

    def seeds(self, indices: range) -> list[int]:
        """The seeds of some images: their numbers."""
        return list(indices)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        order = "in turn" if self.label_seed is None else f"random, seed {self.label_seed}"
        return {"count": self.count, "labels": list(self.classes), "order": order}
