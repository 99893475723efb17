"""One pass over a set of images, remembered as sums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pra.errors import PraError
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.metrics import Moments, Protocol, inception_score, neighbour_steps, score_sums
from pra.sampling.batches import Batch
from pra.utils.distributed import ALONE, World
from pra.utils.progress import Progress


class Collector:
    """Sums over a set of images, and the features of at most ``keep`` of them, evenly spread.

    Processes that share a set of ``count`` images have one each, over their own images, and :meth:`merge` them.
    ``sums`` holds the :class:`Moments` "pool" and, if the extractor has such features, "spatial"; and "steps", the
    differences between neighbouring pixels.
    """

    def __init__(
        self, extractor: FeatureExtractor, count: int, keep: int, shape: tuple[int, ...] | None = None
    ) -> None:
        if count < 2:
            raise PraError(f"{count} image(s) have no distribution. Give at least 2", value=count)
        self.extractor, self.count, self.keep, self.shape = extractor, count, min(keep, count), shape
        self.splits = {protocol: protocol.split_of(count) for protocol in Protocol}
        self.sums: dict[str, Any] = {"images": 0, "digests": 0, "kept": [], "judged": 0, "right": 0}

    def add(self, images: Tensor, labels: Tensor | None, start: int) -> None:
        """Add images ``start, start + 1, ...``, uint8 ``(B, C, H, W)``; ``labels`` ``(B,)`` where they are known.

        Raises:
            PraError: more than ``count`` images, another shape, or a label beyond the extractor's classes.
        """
        self._check_shape(tuple(images.shape[1:]))
        if start + len(images) > self.count:
            raise PraError(f"more than {self.count} images were given. Correct the count", "mismatch", count=self.count)
        pool, spatial, logits = self.extractor(images)
        # While a GPU is still at the features.
        sums: dict[str, Any] = {"images": len(images), "digests": digest_sum(images), "steps": neighbour_steps(images)}
        sums["pool"] = Moments.of(pool.cpu().numpy())
        if spatial is not None:
            sums["spatial"] = Moments.of(spatial.cpu().numpy())
        if logits is not None:
            for protocol, split in self.splits.items():
                own = split[start : start + len(images)]
                sums[protocol.value] = score_sums(logits, own, parts=int(split.max()) + 1)
        if logits is not None and labels is not None and (classes := self.extractor.classes):
            if (label := int(labels.max())) >= len(classes):
                problem = f"label {label}: the reference has {len(classes)} classes"
                raise PraError(f"{problem}. Use another", "mismatch", label=label)
            sums["judged"] = len(labels)
            sums["right"] = int((logits.argmax(dim=1).cpu() == labels.cpu()).sum())
        places = torch.arange(start, start + len(images))
        chosen = places * self.keep // self.count < (places + 1) * self.keep // self.count
        sums["kept"] = [(start, pool.cpu()[chosen].clone())]
        self._join(sums)

    def _join(self, sums: dict[str, Any]) -> None:
        self.sums |= {name: self.sums[name] + value if name in self.sums else value for name, value in sums.items()}

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        self.shape = self.shape or shape
        if shape != self.shape:
            there, here = shape_text(self.shape), shape_text(shape)
            problem = f"images of {there} and of {here} (CxHxW)"
            raise PraError(f"{problem}. Bring all to one shape", "mismatch", first=there, other=here)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the network, for another process."""
        return self.__dict__ | {"extractor": None}

    def merge(self, other: Collector) -> None:
        """Add the sums of another process over the same set."""
        assert (self.count, self.keep) == (other.count, other.keep), "collectors of different sets"
        if other.shape:
            self._check_shape(other.shape)
        self._join(other.sums)

    def check_complete(self) -> None:
        """Refuse a set with images missing."""
        if (seen := self.sums["images"]) != self.count:
            raise PraError(f"{seen} images, not {self.count}. Correct the count", "mismatch", count=self.count)

    def inception_score(self, protocol: Protocol) -> tuple[float, float] | None:
        """Return the Inception Score and its deviation over a protocol's parts; None without logits or images."""
        return inception_score(self.sums[protocol.value]) if protocol.value in self.sums else None

    @property
    def images_sha256(self) -> str:
        """Return the identity of the images, in any order and however they were batched and shared."""
        return f"{self.sums['digests'] % 2**256:064x}"

    @property
    def kept(self) -> Tensor:
        """Return the kept features in the images' order, float32 ``(keep, D)``."""
        return torch.cat([features for _, features in sorted(self.sums["kept"], key=lambda part: part[0])])

    @property
    def accuracy(self) -> float | None:
        """Return the share of images in which the classifier sees their label; None without labels or classes."""
        return self.sums["right"] / self.sums["judged"] if self.sums["judged"] else None


Collected = dict[Protocol, Collector]
"""A collector per protocol; for uint8 images torch-fidelity's alone, since there is nothing to round."""


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

    ``keep`` is the number of features to keep of the whole set, ``what`` the bar's name. Images of another shape than
    ``shape`` ``(C, H, W)``, by default that of the first image, are refused.
    """
    collectors = {protocol: Collector(extractor, count, keep, shape) for protocol in Protocol}
    hidden, total = not (progress and world.is_first), len(world.share(count))
    with Progress(total=total, unit="image", desc=what, disable=hidden) as bar:
        for images, labels, start in batches:
            if images.dtype is torch.uint8:
                collectors.pop(Protocol.ADM, None)
            for protocol, collector in collectors.items():
                collector.add(protocol.quantise(images), labels, start)
            bar.update(len(images))
    return collectors


def merged(parts: Sequence[Collected]) -> Collected:
    """Join the shares of all processes, this one's first, into that one; refuse a set with images missing."""
    whole = {protocol: own for protocol, own in parts[0].items() if all(protocol in part for part in parts)}
    for protocol, collector in whole.items():
        for part in parts[1:]:
            collector.merge(part[protocol])
        collector.check_complete()
    return whole


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
