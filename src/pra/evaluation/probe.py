"""The linear probe: how well a linear classifier reads the class from a frozen model's features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pra.config import DataConfig
from pra.data import Source, open_source
from pra.data.loader import reading
from pra.data.source import SPLIT
from pra.errors import PraError
from pra.evaluation.probe_features import Examples, Layers, Pooling, Vectors, collect_vectors, join_examples, select
from pra.evaluation.probe_linear import VALIDATED, Linear, accuracy
from pra.evaluation.samples import prepared, spread
from pra.utils.distributed import ALONE, World

FEWEST = 2 * VALIDATED


@dataclass(frozen=True)
class Figure:
    """One linear classifier, fitted to one vector per image.

    ``layer`` and ``pooling`` are None for raw pixels; ``dim`` is the vector's length. ``top1`` on the held-out set and
    ``validation`` are accuracies, 0 to 1; ``value`` (learning rate or C) was chosen by the latter.
    """

    layer: int | None
    pooling: str | None
    dim: int
    top1: float
    validation: float
    value: float


def best(figures: Sequence[Figure]) -> Figure:
    """The layer and pooling that validation chooses; the first of several."""
    return max(figures, key=lambda figure: figure.validation)


@dataclass(frozen=True)
class Task:
    """A labelled set to fit linear classifiers on, and a held-out one to judge them on.

    ``chosen`` and ``asked`` are the indices of their images that are taken; ``data`` says how these are prepared.
    """

    train: Source
    test: Source
    chosen: list[int]
    asked: list[int]
    data: DataConfig

    @staticmethod
    def open(data: DataConfig, train: str, test: str, num: int | None = None) -> Task:
        """The task of two sources.

        Args:
            data: how images are prepared; its own source does not count.
            train: where to fit.
            test: where to judge.
            num: images to take of each at most, evenly spread; all by default.

        Raises:
            PraError: a source that cannot be opened, the same one twice, other classes in one than in the other, fewer
                than 2, or too few images.
        """
        sources = open_source(train), open_source(test)
        for source in sources:
            if len(source.classes) < 2:
                raise PraError(f"{source.name} has one class, which nothing can be told from; a probe needs at least 2")
        if sources[0].classes != sources[1].classes:
            raise PraError(
                f"{train} has the classes {_some(sources[0].classes)} and {test} {_some(sources[1].classes)}; a probe "
                "is judged on the classes that it was fitted to"
            )
        if _place(train) == _place(test):
            raise PraError(
                f"{test} is what the probe is fitted to; it is judged on other images: give them with --test"
            )
        chosen, asked = (spread(len(source), min(num or len(source), len(source))) for source in sources)
        if len(chosen) < FEWEST:
            raise PraError(f"{train} gives {len(chosen)} images to fit on: a probe needs at least {FEWEST}")
        if len(set(sources[0].labels[chosen].tolist())) < 2:
            raise PraError(f"the {len(chosen)} images taken of {train} are of one class; a probe needs at least 2")
        return Task(*sources, chosen, asked, data)

    def figures(
        self,
        vectors: Vectors,
        linear: Linear,
        size: tuple[int, int],
        channels: int,
        device: torch.device,
        batch_size: int = 256,
        progress: bool = True,
        world: World = ALONE,
    ) -> list[Figure]:
        """One figure per layer and pooling of ``vectors``; in every process but the first none.

        Args:
            vectors: what is probed.
            linear: the kind of classifier.
            size: height and width of the images.
            channels: of the images.
            device: where ``vectors`` runs, and SGD.
            batch_size: images at a time; nothing depends on it beyond rounding.
            progress: whether to show bars.
            world: the processes that share the images; the first fits.

        Raises:
            PraError: images that cannot be prepared, or vectors beyond the memory.
        """
        found = []
        for source, chosen in ((self.train, self.chosen), (self.test, self.asked)):
            share = world.share(len(chosen))
            shown = progress and world.is_first
            with reading(prepared(source, chosen, size, channels, self.data, batch_size, share)) as batches:
                own = collect_vectors(vectors, batches, len(share), device, shown, f"{vectors.name}: {source.name}")
            found.append(join_examples(own, world))
        if not world.is_first:
            return []
        train, test = found
        classes = len(self.train.classes)
        result = []
        for place, (layer, pooling) in _vectors_of(vectors):
            x, queries = (_take(part, place, pooling) for part in (train, test))
            measured = accuracy(linear, (x, train.labels), (queries, test.labels), classes, device)
            result.append(Figure(layer, pooling.value if pooling else None, x.shape[1], *measured))
        return result


def held_out(source: str) -> str:
    """The held-out part of a source: ``"digits@test"`` of ``"digits"``.

    Raises:
        PraError: it has none, or is one.
    """
    if source.endswith("@test"):
        raise PraError(f"{source} is a held-out part; a probe is fitted on {source.removesuffix('@test')}: give that")
    if source.partition(":")[0] not in SPLIT:
        raise PraError(f"{source} has no held-out part that pra knows of; say where one is with --test SRC")
    return f"{source}@test"


def _place(source: str) -> tuple[str, str]:
    """The same of ``folder:x`` and ``folder:x/``."""
    kind, _, path = source.partition(":")
    return kind, os.path.realpath(os.path.expanduser(path))


def _vectors_of(vectors: Vectors) -> list[tuple[int, tuple[int | None, Pooling | None]]]:
    """The place of each vector's layer, the layer, and its pooling."""
    if isinstance(vectors, Layers):
        return [(place, (layer, pooling)) for place, layer in enumerate(vectors.layers) for pooling in vectors.poolings]
    return [(0, (None, None))]


def _take(examples: Examples, place: int, pooling: Pooling | None) -> Tensor:
    layer = examples.vectors[place]
    return select(layer, pooling) if pooling else layer[0]


def _some(classes: Sequence[str]) -> str:
    """``"cat, dog, ... (10)"``."""
    return f"{', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''} ({len(classes)})"
