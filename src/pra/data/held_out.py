"""Held-out images: the loss is measured on them, the run does not learn from them."""

from __future__ import annotations

import numpy as np
import torch

from pra.config import DataConfig
from pra.data.images import Labels
from pra.data.source import Part, Source, Streamed, in_classes, open_source, own_test_split, same_place, with_images
from pra.errors import PraError
from pra.method import noise
from pra.method.noise import Purpose


def split(source: Source, config: DataConfig, seed: int) -> tuple[Source, Source | None]:
    """Return the images to learn from, and the held-out ones of ``config.validation``, if any.

    A share is a function of the seed and of the labels; each class gives the same share, up to one image. Refuse a
    source of other classes, the training source itself, a share that leaves nothing, and a share of a stream.
    """
    share = config.held_out_share
    if share is not None:
        if isinstance(source, Streamed):
            problem = f"{source.name} is a stream, which cannot be divided"
            raise PraError(f"data.validation {share:g}: {problem}. Name a source", "unsupported", value=share)
        held = _share(source, share, seed)
        return Part(source, np.setdiff1d(np.arange(len(source)), held)), Part(source, held)
    if config.validation is None:
        return source, None
    name = own_test_split(source.name) if config.validation == "test" else str(config.validation)
    if same_place(name, source.name):
        fix = "Name another source, or a share such as 0.05"
        raise PraError(f"data.validation {name!r} is the training source. {fix}", "conflict", name=name)
    other = open_source(name)
    alike = in_classes(other, source.classes)
    if alike is None:
        strange = sorted({other.classes[label] for label in with_images(other)} - set(source.classes))
        problem = f"has other classes than {source.name}" + (f", such as {strange[0]!r}" if strange else "")
        raise PraError(f"data.validation {name!r} {problem}. Name a source of the same classes", "mismatch", name=name)
    return source, alike


def _share(source: Source, share: float, seed: int) -> Labels:
    """Return the held-out places, in ascending order: evenly spread over the classes, and random within each."""
    total = len(source)
    count = max(1, round(share * total))
    if count >= total:
        raise PraError(f"data.validation {share:g}: {source.name} has {total} images. Use a smaller share", value=share)
    key = noise.fold(noise.keys(seed, torch.tensor(0)), Purpose.HELD_OUT)
    shuffled = noise.permutation(key, total).numpy()
    by_class = shuffled[np.argsort(source.labels[shuffled], kind="stable")]
    places = ((np.arange(count) + 0.5) * total / count).astype(np.int64)
    return np.sort(by_class[places]).astype(np.int64)
