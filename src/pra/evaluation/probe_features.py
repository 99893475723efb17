"""What a frozen model knows of an image: the tokens of its layers, pooled to one vector.

The backbone reads clean patches under the null class, so that nothing in the features can come from the label. As in
iGPT (Chen et al., ICML 2020) tokens are normalised before they are averaged; here by their root mean square.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.errors import PraError
from pra.method import flow, noise
from pra.models import Model
from pra.sampling.batches import Batch
from pra.utils.distributed import World
from pra.utils.pixels import from_uint8
from pra.utils.progress import Progress

NOISE_SEED = 0
PIXELS_SIDE = 32
"""The raw pixels of larger images are averaged down to that many a side."""


class Pooling(enum.Enum):
    """From an image's tokens to one vector: their mean, the last in raster order, or both one after the other.

    In a causal model only the last token has seen the whole sequence.
    """

    MEAN = "mean"
    LAST = "last"
    BOTH = "both"


def select(pooled: Tensor, pooling: Pooling) -> Tensor:
    """``(B, D)``, or ``(B, 2 D)`` for both, of the means and last tokens ``(2, B, D)``."""
    if pooling is Pooling.BOTH:
        return torch.cat(list(pooled), dim=-1)
    return pooled[0 if pooling is Pooling.MEAN else 1]


class Vectors(Protocol):
    """What is probed. ``shape`` is (layers, vectors per layer, numbers in each)."""

    name: str
    shape: tuple[int, int, int]

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """Of images ``start, start + 1, ...`` of a set, ``(B, C, H, W)`` in [-1, 1]: ``(*shape[:2], B, shape[2])``."""
        ...


class Layers:
    """Mean and last token behind some layers of a model, float32: ``(len(layers), 2, B, D)``.

    A token counts with the same weight wherever it is, after division by its root mean square. In an autoregressive
    model the last patch is never an input: the tokens are those of the ``N - 1`` before it. Class tokens do not count.

    Args:
        model: in evaluation mode.
        layers: counted from 1; behind layer 1 is the output of the first block.
        time: JiT's flow time, in [0, 1], at which it reads the image: 1 is the clean one, and below that noise is mixed
            in, of which every image has its own. None for an autoregressive model, which reads clean patches.
        name: for progress bars.

    Raises:
        PraError: a layer that the model does not have, or a time that does not suit it.
    """

    def __init__(self, model: Model, layers: Sequence[int], time: float | None = None, name: str = "features") -> None:
        for layer in layers:
            if not 1 <= layer <= len(model.blocks):
                raise PraError(f"layer {layer} is none of this model's: it has layers 1 to {len(model.blocks)}")
        if model.config.reading_time is None:
            if time is not None:
                raise PraError("--time is for JiT, which reads noised images; an autoregressive model reads clean ones")
        elif time is None or not 0 <= time <= 1:
            raise PraError(f"--time {time} is no flow time; give one from 0 (noise) to 1 (the clean image)")
        self.model, self.layers, self.time, self.name = model, list(layers), time, name
        self.shape = (len(layers), 2, model.config.width)

    @property
    def poolings(self) -> list[Pooling]:
        """Those that say something: where every token sees all others, the last is one like any other."""
        return list(Pooling) if self.model.config.autoregressive else [Pooling.MEAN]

    @torch.no_grad()
    def __call__(self, images: Tensor, start: int) -> Tensor:
        """As :meth:`Vectors.__call__`."""
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
        """``(B, T, D)`` to ``(2, B, D)``."""
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

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """As :meth:`Vectors.__call__`."""
        return F.adaptive_avg_pool2d(images, self.size).flatten(1).view(1, 1, len(images), -1)


class Examples(NamedTuple):
    """A labelled set: ``vectors`` float32 ``(layers, vectors per layer, n, D)`` and ``labels`` int64 ``(n,)``."""

    vectors: Tensor
    labels: Tensor


def collect_vectors(
    vectors: Vectors, batches: Iterable[Batch], count: int, device: torch.device, progress: bool = True, what: str = ""
) -> Examples:
    """The vectors of a whole set, in memory.

    Args:
        vectors: makes them.
        batches: the set, or one process's share of it, with labels.
        count: images in these batches.
        device: where ``vectors`` runs; the result is on the CPU.
        progress: whether to show a bar.
        what: its name.

    Raises:
        PraError: the machine has less memory than they need; or as the batches.
    """
    layers, each, width = vectors.shape
    check_memory(4 * layers * each * width * count)
    whole, labels = torch.empty(layers, each, count, width), torch.empty(count, dtype=torch.int64)
    done = 0
    with Progress(total=count, unit="image", desc=what, disable=not progress) as bar:
        for batch in batches:
            here = slice(done, done + len(batch.images))
            assert batch.labels is not None, "a set to learn from has labels"
            whole[:, :, here] = vectors(from_uint8(batch.images.to(device)), batch.start).cpu()
            labels[here] = batch.labels
            done += len(batch.images)
            bar.update(len(batch.images))
    return Examples(whole, labels)


def join_examples(own: Examples, world: World) -> Examples:
    """The whole set in the first process, from the shares of all; the other processes keep their own."""
    whole = [own]

    def join(parts: list[Examples]) -> None:
        if len(parts) > 1:
            vectors, labels = zip(*parts, strict=True)
            whole[0] = Examples(torch.cat(vectors, dim=2), torch.cat(labels))

    world.combine(own, join)
    return whole[0]


def check_memory(size: int) -> None:
    """Refuses ``size`` bytes of features where the machine's whole memory is less.

    Raises:
        PraError: it is.
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return
    if size > there:
        raise PraError(
            f"the features would need {size / 2**30:.0f} GiB of this machine's {there / 2**30:.0f}; name fewer "
            "--layers, or give --num"
        )
