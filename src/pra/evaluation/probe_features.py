"""Features of a frozen model: the tokens of its layers, pooled to one vector per image.

The backbone reads clean patches under the null class, so that nothing in the features can come from the label. As in
iGPT (Chen et al., ICML 2020) tokens are normalised before they are averaged; here by their root mean square.
"""

from __future__ import annotations

import enum
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pra.errors import PraError
from pra.method import flow, noise
from pra.models import Model
from pra.sampling.batches import Batch
from pra.utils.files import write_atomically
from pra.utils.pixels import from_uint8
from pra.utils.progress import Progress

NOISE_SEED = 0
PIXELS_SIDE = 32
"""Raw pixels of larger images are averaged down to this many a side."""


class Pooling(enum.Enum):
    """One vector of an image's tokens: their mean, the last in raster order, or both one after the other.

    In a causal model only the last token has seen the whole sequence.
    """

    MEAN = "mean"
    LAST = "last"
    BOTH = "both"


def select(pooled: Tensor, pooling: Pooling) -> Tensor:
    """Return ``(B, D)``, or ``(B, 2 D)`` for both, of the means and last tokens ``(2, B, D)``."""
    if pooling is Pooling.BOTH:
        return torch.cat(list(pooled), dim=-1)
    return pooled[0 if pooling is Pooling.MEAN else 1]


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

    @property
    def poolings(self) -> list[Pooling]:
        """Return those that differ: where every token sees all others, the last is like any other."""
        return list(Pooling) if self.model.config.autoregressive else [Pooling.MEAN]

    def columns(self, vectors: Tensor) -> Iterator[tuple[int, str, Tensor]]:
        """Yield layer, pooling and one vector per image, ``(B, D)`` or ``(B, 2 D)``."""
        for layer, pooled in zip(self.layers, vectors, strict=True):
            for pooling in self.poolings:
                yield layer, pooling.value, select(pooled, pooling)

    @torch.no_grad()
    def __call__(self, images: Tensor, start: int) -> Tensor:
        """Return the vectors of images ``start, start + 1, ...`` of a set, ``(B, C, H, W)`` in [-1, 1]."""
        found: dict[int, Tensor] = {}
        handles = [
            self.model.blocks[layer - 1].register_forward_hook(
                lambda block, inputs, output, layer=layer: found.update({layer: self._pool(output)})
            )
            for layer in self.layers
        ]
        try:
            self._read(images, start)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[layer] for layer in self.layers])

    def _pool(self, output: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(2, B, D)``."""
        tokens = output[:, self.model.prefix :].float()
        tokens = F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)
        return torch.stack([tokens.mean(dim=1), tokens[:, -1]])

    def _read(self, images: Tensor, start: int) -> None:
        model, t = self.model, None
        patches = model.patchify(images)
        unlabelled = model.condition.null_like(torch.empty(len(images), dtype=torch.int64, device=images.device))
        if self.time is not None:
            keys = noise.keys(NOISE_SEED, torch.arange(start, start + len(images))).to(images.device)
            t = torch.full((1, 1), self.time, device=images.device)
            patches = flow.interpolate(noise.normal(keys, *patches.shape[1:]), patches, t.unsqueeze(-1))
        model.read(unlabelled, patches, t)


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


class Examples(NamedTuple):
    """A labelled set: ``vectors`` float32 ``(layers, vectors per layer, n, D)`` and ``labels`` int64 ``(n,)``."""

    vectors: Tensor
    labels: Tensor


def collect_vectors(
    vectors: Vectors, batches: Iterable[Batch], count: int, device: torch.device, progress: bool, what: str
) -> Examples:
    """Return the vectors of ``count`` labelled images, on the CPU.

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
    return Examples(whole, labels)


def check_memory(size: int) -> None:
    """Refuse ``size`` bytes of features where the machine's whole memory is less."""
    try:
        there: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        there = math.inf
    if size > there:
        problem = f"the features need {size / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}"
        raise PraError(f"{problem}. Name fewer --layers, or give --num", "too-large")


def export_features(
    path: Path,
    layer: Layers,
    pooling: Pooling,
    batches: Iterable[Batch],
    count: int,
    device: torch.device,
    known: dict[str, Any],
) -> None:
    """Write the features of one layer as ``FILE.npz``, whole or not at all; only a batch is in memory at a time.

    The file holds ``features`` float32 ``(count, D)``, ``labels`` int64 ``(count,)``, and ``pra``, a JSON text of what
    is ``known``.
    """
    width = layer.shape[2] * (2 if pooling is Pooling.BOTH else 1)

    def write(file: IO[bytes]) -> None:
        labels: list[Tensor] = []
        with zipfile.ZipFile(file, "w") as archive:
            with (
                archive.open("features.npy", "w", force_zip64=True) as array,
                Progress(total=count, unit="image", desc="features") as bar,
            ):
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
                np.lib.format.write_array_header_1_0(array, header)
                for batch in batches:
                    vectors = layer(from_uint8(batch.images.to(device)), batch.start)[0]
                    array.write(select(vectors, pooling).cpu().numpy().astype("<f4").tobytes())
                    labels.append(batch.labels)  # type: ignore[arg-type]
                    bar.update(len(batch.images))
            for name, values in (("labels", torch.cat(labels).numpy()), ("pra", np.array(json.dumps(known)))):
                with archive.open(f"{name}.npy", "w") as array:
                    np.lib.format.write_array(array, values)

    write_atomically(path, write)
