"""One pass over a set of images, of which sums are remembered: two of them are then compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pra.errors import PraError
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.metrics import InceptionScore, Moments, Protocol
from pra.sampling.batches import Batch
from pra.utils.distributed import ALONE, World
from pra.utils.progress import Progress


class Collector:
    """What is remembered of a set of images: sums, and the features of at most ``keep`` of them, evenly spread.

    Processes that share a set have one each, over their own images, and :meth:`merge` them.

    Args:
        extractor: makes the features.
        count: images of the whole set, at least 2.
        keep: features to keep, for KID, precision and recall.
    """

    def __init__(self, extractor: FeatureExtractor, count: int, keep: int) -> None:
        if count < 2:
            raise PraError(f"{count} image(s) have no distribution; give at least 2")
        self.extractor = extractor
        self.count = count
        self.seen = 0
        self.keep = min(keep, count)
        self.pool = Moments(extractor.dim)
        self.spatial: Moments | None = None
        self.scores = {protocol: InceptionScore(count, protocol) for protocol in Protocol}
        self.judged = self.right = 0
        self.shape: tuple[int, ...] | None = None
        self.digests = 0
        self._kept: list[tuple[int, Tensor]] = []

    def add(self, images: Tensor, labels: Tensor | None, start: int) -> None:
        """Adds images ``start, start + 1, ...``, uint8 ``(B, C, H, W)``; ``labels`` ``(B,)`` where they are known.

        Raises:
            PraError: an image more than ``count``, of another shape than the first, or a label that the extractor's
                classes do not have.
        """
        shape = tuple(images.shape[1:])
        self.shape = self.shape or shape
        if shape != self.shape:
            raise PraError(
                f"images of {shape_text(shape)} follow images of {shape_text(self.shape)}; a set has one size"
            )
        if start + len(images) > self.count:
            raise PraError(f"more images than the {self.count} that were announced; correct the count")
        pool, spatial, logits = self.extractor(images)
        self.digests = (self.digests + digest_sum(images)) % 2**256  # while a GPU is still at the features
        self.pool.update(pool.cpu().numpy())
        if spatial is not None:
            self.spatial = self.spatial or Moments(spatial.shape[1])
            self.spatial.update(spatial.cpu().numpy())
        if logits is not None:
            for score in self.scores.values():
                score.update(logits, start)
            if labels is not None and self.extractor.classes:
                self._judge(logits, labels, len(self.extractor.classes))
        places = torch.arange(start, start + len(images))
        chosen = places * self.keep // self.count < (places + 1) * self.keep // self.count
        self._kept.append((start, pool.cpu()[chosen].clone()))
        self.seen += len(images)

    def _judge(self, logits: Tensor, labels: Tensor, classes: int) -> None:
        if len(labels) and int(labels.max()) >= classes:
            raise PraError(
                f"label {int(labels.max())} is out of range: the reference has {classes} classes; give the reference "
                "that the images belong to"
            )
        self.right += int((logits.argmax(dim=1).cpu() == labels.cpu()).sum())
        self.judged += len(labels)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: all but the network."""
        return self.__dict__ | {"extractor": None}

    def merge(self, other: Collector) -> None:
        """Adds what another process has collected of the same set.

        Raises:
            PraError: images of another shape.
        """
        assert (self.count, self.keep) == (other.count, other.keep), "collectors of different sets"
        if self.shape and other.shape and self.shape != other.shape:
            raise PraError(f"images of {shape_text(self.shape)} and of {shape_text(other.shape)}; a set has one size")
        self.pool.merge(other.pool)
        if other.spatial is not None:
            self.spatial = self.spatial or Moments(len(other.spatial.mean))
            self.spatial.merge(other.spatial)
        for protocol, score in self.scores.items():
            score.merge(other.scores[protocol])
        self.digests = (self.digests + other.digests) % 2**256
        self._kept += other._kept
        self.shape = self.shape or other.shape
        self.seen, self.judged, self.right = (
            self.seen + other.seen, self.judged + other.judged, self.right + other.right
        )  # fmt: skip

    def check_complete(self) -> None:
        """Refuses a set with images missing.

        Raises:
            PraError: fewer images came than were announced.
        """
        if self.seen != self.count:
            raise PraError(f"{self.seen} images came of the {self.count} that were announced; correct the count")

    @property
    def images_sha256(self) -> str:
        """The identity of the images, in any order and however they were batched and shared: :func:`digest_sum`."""
        return f"{self.digests:064x}"

    @property
    def kept(self) -> Tensor:
        """The kept features in the images' order, float32 ``(keep, D)``."""
        return torch.cat([features for _, features in sorted(self._kept, key=lambda part: part[0])])

    @property
    def accuracy(self) -> float | None:
        """The share of images in which the classifier sees their label; None without labels or classes."""
        return self.right / self.judged if self.judged else None


Collected = dict[Protocol, Collector]
"""A collector per protocol; the same one where the images are uint8, so that nothing is left to round."""


def collect(
    batches: Iterable[Batch],
    extractor: FeatureExtractor,
    count: int,
    keep: int,
    progress: bool = True,
    what: str = "evaluate",
    world: World = ALONE,
) -> Collected:
    """One pass over a set, or over this process's share of it; :func:`merged` makes one of all shares.

    Args:
        batches: this process's images.
        extractor: makes the features.
        count: images of the whole set, at least 2.
        keep: features to keep of the whole set.
        progress: whether to show a bar, in the first process.
        what: the bar's name.
        world: the processes that share the set.

    Raises:
        PraError: as :meth:`Collector.add`.
    """
    first = Protocol.TORCH_FIDELITY
    collectors = {first: Collector(extractor, count, keep)}
    hidden, total = not (progress and world.is_first), len(world.share(count))
    with Progress(total=total, unit="image", desc=what, disable=hidden) as bar:
        for images, labels, start in batches:
            for protocol in [first] if images.dtype is torch.uint8 else list(Protocol):
                if protocol not in collectors:
                    collectors[protocol] = Collector(extractor, count, keep)
                collectors[protocol].add(protocol.quantise(images), labels, start)
            bar.update(len(images))
    return {protocol: collectors.get(protocol, collectors[first]) for protocol in Protocol}


def merged(parts: Sequence[Collected]) -> Collected:
    """A set from the shares of all processes, this one's first.

    Raises:
        PraError: shares of images of different shapes, or fewer images than were announced.
    """
    own = parts[0][Protocol.ADM]
    wholes: Collected = {}
    for protocol in Protocol:
        if wholes and all(part[protocol] is part[Protocol.ADM] for part in parts):
            wholes[protocol] = wholes[Protocol.ADM]
            continue
        wholes[protocol] = Collector(own.extractor, own.count, own.keep)
        for part in parts:
            wholes[protocol].merge(part[protocol])
        wholes[protocol].check_complete()
    return wholes


def digest_sum(images: Tensor) -> int:
    """The sum, modulo 2^256, of the SHA-256 of each image of ``(B, C, H, W)``: of ``b"3x32x32 "``, its channels, height
    and width, and its uint8 pixels in the order C, H, W."""
    head = hashlib.sha256(f"{shape_text(tuple(images.shape[1:]))} ".encode())
    total = 0
    for image in images.cpu().contiguous().numpy():
        digest = head.copy()
        digest.update(image.data)
        total += int.from_bytes(digest.digest())
    return total % 2**256


def shape_text(shape: tuple[int, ...]) -> str:
    """``"3x32x32"``."""
    return "x".join(map(str, shape))
