"""One pass over a set of images, remembered as sums."""

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
    """Sums over a set of images, and the features of at most ``keep`` of them, evenly spread.

    Processes that share a set of ``count`` images have one each, over their own images, and :meth:`merge` them.
    """

    def __init__(
        self, extractor: FeatureExtractor, count: int, keep: int, shape: tuple[int, ...] | None = None
    ) -> None:
        if count < 2:
            raise PraError(f"{count} image(s) have no distribution. Give at least 2", value=count)
        self.extractor = extractor
        self.count = count
        self.seen = 0
        self.keep = min(keep, count)
        self.pool = Moments(extractor.dim)
        self.spatial: Moments | None = None
        self.scores = {protocol: InceptionScore(count, protocol) for protocol in Protocol}
        self.judged = self.right = 0
        self.shape = shape
        self.digests = 0
        self._kept: list[tuple[int, Tensor]] = []

    def add(self, images: Tensor, labels: Tensor | None, start: int) -> None:
        """Add images ``start, start + 1, ...``, uint8 ``(B, C, H, W)``; ``labels`` ``(B,)`` where they are known.

        Raises:
            PraError: more than ``count`` images, another shape, or a label beyond the extractor's classes.
        """
        self._check_shape(tuple(images.shape[1:]))
        if start + len(images) > self.count:
            raise PraError(f"more than {self.count} images came. Correct the count", "mismatch", count=self.count)
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

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        self.shape = self.shape or shape
        if shape != self.shape:
            there, here = shape_text(self.shape), shape_text(shape)
            problem = f"images of {there} and of {here} (CxHxW)"
            raise PraError(f"{problem}. Bring all to one shape", "mismatch", first=there, other=here)

    def _judge(self, logits: Tensor, labels: Tensor, classes: int) -> None:
        if len(labels) and int(labels.max()) >= classes:
            label = int(labels.max())
            raise PraError(f"label {label}: the reference has {classes} classes. Use another", "mismatch", label=label)
        self.right += int((logits.argmax(dim=1).cpu() == labels.cpu()).sum())
        self.judged += len(labels)

    def __getstate__(self) -> dict[str, Any]:
        """Return what goes to another process: all but the network."""
        return self.__dict__ | {"extractor": None}

    def merge(self, other: Collector) -> None:
        """Add what another process has collected of the same set."""
        assert (self.count, self.keep) == (other.count, other.keep), "collectors of different sets"
        if other.shape:
            self._check_shape(other.shape)
        self.pool.merge(other.pool)
        if other.spatial is not None:
            self.spatial = self.spatial or Moments(len(other.spatial.mean))
            self.spatial.merge(other.spatial)
        for protocol, score in self.scores.items():
            score.merge(other.scores[protocol])
        self.digests = (self.digests + other.digests) % 2**256
        self._kept += other._kept
        self.seen += other.seen
        self.judged += other.judged
        self.right += other.right

    def check_complete(self) -> None:
        """Refuse a set with images missing."""
        if self.seen != self.count:
            problem = f"{self.seen} images came, not {self.count}"
            raise PraError(f"{problem}. Correct the count", "mismatch", count=self.count)

    @property
    def images_sha256(self) -> str:
        """Return the identity of the images, in any order and however they were batched and shared."""
        return f"{self.digests:064x}"

    @property
    def kept(self) -> Tensor:
        """Return the kept features in the images' order, float32 ``(keep, D)``."""
        return torch.cat([features for _, features in sorted(self._kept, key=lambda part: part[0])])

    @property
    def accuracy(self) -> float | None:
        """Return the share of images in which the classifier sees their label; None without labels or classes."""
        return self.right / self.judged if self.judged else None


Collected = dict[Protocol, Collector]
"""A collector per protocol; the same one where the images are uint8, so that there is nothing to round."""


def collect(
    batches: Iterable[Batch],
    extractor: FeatureExtractor,
    count: int,
    keep: int,
    progress: bool = True,
    what: str = "evaluate",
    world: World = ALONE,
    shape: tuple[int, ...] | None = None,
) -> Collected:
    """Pass once over a set of ``count`` images, or over this process's share; :func:`merged` joins the shares.

    ``keep`` is the number of features to keep of the whole set, ``what`` the bar's name. Images of another ``shape``
    ``(C, H, W)`` are refused, by default than that of the first.
    """
    first = Protocol.TORCH_FIDELITY
    collectors = {first: Collector(extractor, count, keep, shape)}
    hidden, total = not (progress and world.is_first), len(world.share(count))
    with Progress(total=total, unit="image", desc=what, disable=hidden) as bar:
        for images, labels, start in batches:
            for protocol in [first] if images.dtype is torch.uint8 else list(Protocol):
                if protocol not in collectors:
                    collectors[protocol] = Collector(extractor, count, keep, shape)
                collectors[protocol].add(protocol.quantise(images), labels, start)
            bar.update(len(images))
    return {protocol: collectors.get(protocol, collectors[first]) for protocol in Protocol}


def merged(parts: Sequence[Collected]) -> Collected:
    """Join the shares of all processes, this one's first; refuse a set with images missing."""
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
    """Return the sum, modulo 2^256, of the SHA-256 of each image of ``(B, C, H, W)``.

    Hashed are ``b"3x32x32 "`` (channels, height and width) and the uint8 pixels in the order C, H, W.
    """
    head = hashlib.sha256(f"{shape_text(tuple(images.shape[1:]))} ".encode())
    total = 0
    for image in images.cpu().contiguous().numpy():
        digest = head.copy()
        digest.update(image.data)
        total += int.from_bytes(digest.digest())
    return total % 2**256


def shape_text(shape: tuple[int, ...]) -> str:
    """Return ``"3x32x32"``."""
    return "x".join(map(str, shape))
