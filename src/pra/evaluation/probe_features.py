"""Features of a frozen model: the tokens of its layers, pooled to one vector per image.

The backbone reads clean patches under the null class, so that nothing in the features can come from the label. As in
iGPT (Chen et al., ICML 2020) tokens are normalised before they are averaged; here by their root mean square.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.errors import PraError
from pra.method import flow, noise
from pra.models import Model
from pra.sampling.batches import Batch
from pra.utils.pixels import from_uint8
from pra.utils.progress import Progress

NOISE_SEED = 0
PIXELS_SIDE = 32
"""Raw pixels of larger images are averaged down to this many a side."""


POOLINGS = ("mean", "last", "both")
"""One vector of an image's tokens: their mean, the last in raster order, or both one after the other.

In a causal model only the last token has seen the whole sequence.
"""


def select(pooled: Tensor, pooling: str) -> Tensor:
    """Return ``(B, D)``, or ``(B, 2 D)`` for both, of the means and last tokens ``(2, B, D)``."""
    return torch.cat(list(pooled), dim=-1) if pooling == "both" else pooled[POOLINGS.index(pooling)]


class Layers:
    """Mean and last token behind some layers of a model, counted from 1: float32 ``(len(layers), 2, B, D)``.

    Each token is divided by its root mean square. In an autoregressive model the last patch is never an input: the
    tokens are those of the ``N - 1`` before it. Class tokens do not count. ``time`` in [0, 1] is the flow time at which
    JiT reads the image, 1 being the clean one; below that every image gets noise of its own.

    Raises:
        PraError: a layer that the model does not have, or a time that does not suit it.
    """

    def __init__(self, model: Model, layers: Sequence[int], time: float | None = None, name: str = "features") -> None:
        for layer in layers:
            if not 1 <= layer <= len(model.blocks):
                problem = f"the model does not have layer {layer}"
                raise PraError(f"{problem}. Use layers 1 to {len(model.blocks)}", "unknown", layer=layer)
        if model.config.reading_time is None:
            if time is not None:
                raise PraError(f"--time {time} is for JiT: this model reads clean images. Leave it out", value=time)
        elif time is None or not 0 <= time <= 1:
            raise PraError(f"--time {time} is not a flow time. Give one from 0 (noise) to 1 (the image)", value=time)
        self.model, self.layers, self.time, self.name = model, list(layers), time, name
        self.shape = (len(layers), 2, model.config.width)

    def columns(self, vectors: Tensor) -> Iterator[tuple[int, str, Tensor]]:
        """Yield layer, pooling and one vector per image, ``(B, D)`` or ``(B, 2 D)``.

        Where every token sees all others, the last is like any other: then the mean is the only pooling.
        """
        for layer, pooled in zip(self.layers, vectors, strict=True):
            for pooling in POOLINGS if self.model.config.autoregressive else POOLINGS[:1]:
                yield layer, pooling, select(pooled, pooling)

    @torch.no_grad()
    def __call__(self, images: Tensor, start: int) -> Tensor:
        """Return the vectors of images ``start, start + 1, ...`` of a set, ``(B, C, H, W)`` in [-1, 1]."""
        model, t, found = self.model, None, {}

        def keep(layer: int, output: Tensor) -> None:
            tokens = output[:, model.prefix :].float()
            tokens = F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)
            found[layer] = torch.stack([tokens.mean(dim=1), tokens[:, -1]])

        patches = model.patchify(images)
        unlabelled = model.condition.null_like(torch.empty(len(images), dtype=torch.int64, device=images.device))
        if self.time is not None:
            keys = noise.keys(NOISE_SEED, torch.arange(start, start + len(images))).to(images.device)
            t = torch.full((1, 1), self.time, device=images.device)
            patches = flow.interpolate(noise.normal(keys, *patches.shape[1:]), patches, t.unsqueeze(-1))
        with ExitStack() as hooks:
            for layer in self.layers:
                block = model.blocks[layer - 1]
                hooks.enter_context(block.register_forward_hook(lambda *args, layer=layer: keep(layer, args[-1])))
            model.read(unlabelled, patches, t)
        return torch.stack([found[layer] for layer in self.layers])


class Pixels:
    """The image itself, ``(1, 1, B, numbers)``, averaged down to at most ``PIXELS_SIDE`` pixels a side."""

    name = "pixels"

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.size = (min(size[0], PIXELS_SIDE), min(size[1], PIXELS_SIDE))
        self.shape = (1, 1, channels * self.size[0] * self.size[1])

    def columns(self, vectors: Tensor) -> Iterator[tuple[None, None, Tensor]]:
        """Yield the only vector per image, as :meth:`Layers.columns`."""
        yield None, None, vectors[0, 0]

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """Return the vectors of images ``(B, C, H, W)``."""
        return F.adaptive_avg_pool2d(images, self.size).flatten(1).view(1, 1, len(images), -1)


Vectors = Layers | Pixels


def collect_vectors(
    vectors: Vectors, batches: Iterable[Batch], count: int, device: torch.device, progress: bool, what: str
) -> tuple[Tensor, Tensor]:
    """Return the vectors of ``count`` labelled images, float32 ``(layers, vectors per layer, count, D)``, on the CPU,
    and labels int64 ``(count,)``.

    Raises:
        PraError: the machine has less memory than they need.
    """
    layers, each, width = vectors.shape
    check_memory(4 * layers * each * width * count)
    whole, labels = torch.empty(layers, each, count, width), torch.empty(count, dtype=torch.int64)
    done = 0
    with Progress(total=count, unit="image", desc=what, disable=not progress) as bar:
        for batch in batches:
            here = slice(done, done + len(batch.images))
            whole[:, :, here] = vectors(from_uint8(batch.images.to(device)), batch.start).cpu()
            labels[here] = batch.labels  # type: ignore[assignment]
            done += len(batch.images)
            bar.update(len(batch.images))
    return whole, labels


def check_memory(size: int) -> None:
    """Refuse ``size`` bytes of features where the machine's whole memory is less."""
    try:
        there: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        there = math.inf
    if size > there:
        problem = f"the features need {size / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}"
        raise PraError(f"{problem}. Name fewer --layers, or give --num", "too-large")
