"""Features that cost nothing, and sets of images to judge by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import pra
from pra.commands.eval import Judging
from pra.evaluation.evaluate import Report, evaluate
from pra.evaluation.features import Features
from pra.evaluation.reference import Reference, from_batches
from pra.sampling.batches import Batch
from support.models import random_model


class Projection:
    """Fixed random projections of the pixels."""

    device = torch.device("cpu")
    accuracy: float | None = None

    def __init__(
        self, shape: tuple[int, ...] = (1, 4, 4), dim: int = 5, classes: int = 0, name: str = "projection"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name, self.fingerprint, self.dim = name, "0" * 64, dim
        self.classes = tuple(map(str, range(classes))) or None
        self.weights = [torch.randn(math.prod(shape), n, generator=generator) for n in (dim, 3, classes or 4)]

    def __call__(self, images: Tensor) -> Features:
        # Rounded once: in float32 a product may depend on how many rows it has.
        flat = images.flatten(1).double() / 255
        pool, spatial, logits = ((flat @ weights.double()).float() for weights in self.weights)
        return Features(pool.sin(), spatial, logits)


def pixels(count: int, seed: int = 0, shape: tuple[int, int, int] = (1, 4, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator).to(torch.uint8)


def stream(images: Tensor, size: int = 7, labels: Tensor | None = None) -> list[Batch]:
    starts = range(0, len(images), size)
    return [Batch(images[s : s + size], None if labels is None else labels[s : s + size], s) for s in starts]


def reference_of(images: Tensor, extractor: Any) -> Reference:
    return replace(from_batches(stream(images), extractor, len(images), "them", 1000, progress=False), fit="pad")


def judged(images: Tensor, reference: Reference, extractor: Any, size: int = 7, **options: Any) -> Report:
    return evaluate(stream(images, size), reference, extractor, len(images), progress=False, **options)


def run_command(command: Callable[..., None], target: Path | None, **options: Any) -> None:
    """``pra eval`` or ``pra sweep`` on the CPU by the small classifier, with options by their names."""
    given = {"features": "classifier", "device": "cpu"} | options
    own = {field.name: given.pop(field.name) for field in fields(Judging) if field.name in given}
    command(target, how=Judging(**own), **given)


def saved_model(folder: Path, classes: Sequence[str], **changes: Any) -> Path:
    """A random model of these classes, saved."""
    model = random_model(num_classes=len(classes), **changes)
    model.classes = tuple(classes)
    return pra.save(model, folder)


def noise_pictures(folder: Path, counts: dict[str, int], shape: tuple[int, ...] = (6, 8, 3)) -> str:
    """So many pictures of each class, as a source."""
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    return f"folder:{folder}"
