"""Cheap features, and sets of images to judge by them."""

import math
from dataclasses import fields, replace

import numpy as np
import torch
from PIL import Image

import pra
from pra.commands.eval import Judging
from pra.evaluation.evaluate import evaluate
from pra.evaluation.features import Features
from pra.evaluation.reference import from_batches
from pra.sampling.batches import Batch
from support.models import random_model


class Projection:
    """Fixed random projections of the pixels."""

    device = torch.device("cpu")
    accuracy: float | None = None

    def __init__(self, shape=(1, 4, 4), dim=5, classes=0, name="projection"):
        generator = torch.Generator().manual_seed(0)
        self.name, self.fingerprint, self.dim = name, "0" * 64, dim
        self.classes = tuple(map(str, range(classes))) or None
        self.weights = [torch.randn(math.prod(shape), n, generator=generator) for n in (dim, 3, classes or 4)]

    def __call__(self, images):
        # Rounded once: in float32 a product may depend on how many rows it has.
        flat = images.flatten(1).double() / 255
        pool, spatial, logits = ((flat @ weights.double()).float() for weights in self.weights)
        return Features(pool.sin(), spatial, logits)


def pixels(count, seed=0, shape=(1, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator).to(torch.uint8)


def stream(images, size=7, labels=None):
    starts = range(0, len(images), size)
    return [Batch(images[s : s + size], None if labels is None else labels[s : s + size], s) for s in starts]


def reference_of(images, extractor):
    return replace(from_batches(stream(images), extractor, len(images), "them", 1000, progress=False), fit="pad")


def judged(images, reference, extractor, size=7, **options):
    return evaluate(stream(images, size), reference, extractor, len(images), progress=False, **options)


def run_command(command, target, **options):
    """``pra eval`` or ``pra sweep`` on the CPU by the small classifier, with options by their names."""
    given = {"features": "classifier", "device": "cpu"} | options
    own = {field.name: given.pop(field.name) for field in fields(Judging) if field.name in given}
    command(target, how=Judging(**own), **given)


def saved_model(folder, classes, **changes):
    """A random model of these classes, saved."""
    model = random_model(num_classes=len(classes), **changes)
    model.classes = tuple(classes)
    return pra.save(model, folder)


def noise_pictures(folder, counts, shape=(6, 8, 3)):
    """A source with a number of pictures of each class."""
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    return f"folder:{folder}"
