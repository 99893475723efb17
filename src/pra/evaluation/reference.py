"""Reference statistics: from a data source, from ADM's, torch-fidelity's or JiT's files, or from our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, from_numpy

from pra.config import DataConfig
from pra.data import Source
from pra.data.loader import reading
from pra.errors import PraError
from pra.evaluation.collect import Collected, Collector, collect, merged
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.metrics import NEIGHBOURS, Array, Balls, Moments, Protocol
from pra.evaluation.samples import prepared
from pra.sampling.batches import Batch, NpzBatch
from pra.utils.distributed import ALONE, World
from pra.utils.files import write_atomically
from pra.utils.npz import explained, listed, read_arrays
from pra.utils.provenance import file_sha256

FORMAT = 1

_NUMBERS = ("mu", "sigma", "mu_s", "sigma_s", "features")
_DESCRIPTION: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "features": (str,),
    "fingerprint": (str, NoneType),
    "shape": (list, NoneType),
    "fit": (str, NoneType),
    "count": (int, NoneType),
}
"""What our own files say beside numbers, and of what type."""


class Gaussian(NamedTuple):
    """Mean ``(D,)`` and covariance ``(D, D)``, float64."""

    mean: Array
    covariance: Array


def gaussian(moments: Moments) -> Gaussian:
    """The Gaussian with these moments."""
    return Gaussian(moments.mean, moments.covariance)


@dataclass(frozen=True)
class Reference:
    """What sets of images are held against.

    ``features`` and ``fingerprint`` name the extractor; files of others do not know the latter. ``shape``
    ``(C, H, W)``, ``fit`` (how the images were brought to it) and ``count`` of the images, where they are known.
    ``spatial`` serves sFID; ``kept`` ``(n, D)``, features of single images, serve KID, precision and recall.
    ``prepared`` is all that decides the pixels beside ``fit``; ``images_sha256`` tells the prepared images from others,
    in whatever order and batches they were read (:func:`pra.evaluation.collect.digest_sum`).
    """

    name: str
    features: str
    fingerprint: str | None
    shape: tuple[int, ...] | None
    fit: str | None
    count: int | None
    pool: Gaussian
    spatial: Gaussian | None
    kept: Tensor | None
    file_sha256: str | None = None
    prepared: dict[str, Any] | None = None
    images_sha256: str | None = None
    _balls: dict[torch.device, Balls] = field(default_factory=dict, init=False, repr=False, compare=False)

    def balls(self, device: torch.device, progress: bool = False) -> Balls | None:
        """Of the kept features, as precision and recall see them: made once, however many sets are held against them;
        None where there are too few."""
        if self.kept is None or len(self.kept) <= NEIGHBOURS:
            return None
        # MPS has no float64.
        place = device if device.type == "cuda" else torch.device("cpu")
        if place not in self._balls:
            self._balls[place] = Balls(self.kept.to(place), NEIGHBOURS, progress=progress)
        return self._balls[place]

    def check(self, extractor: FeatureExtractor) -> None:
        """Whether ``extractor`` made these statistics.

        Raises:
            PraError: it did not.
        """
        if self.features != extractor.name:
            raise PraError(
                f"the reference {self.name} was made with the features {self.features!r}, not {extractor.name!r}; "
                f"use --features {self.features}, or make statistics anew"
            )
        if self.fingerprint not in (None, extractor.fingerprint):
            raise PraError(
                f"the reference {self.name} was made with other weights of {self.features} (SHA-256 "
                f"{str(self.fingerprint)[:12]}, now {extractor.fingerprint[:12]}); give those with --weights, or make "
                "statistics anew"
            )
        if len(self.pool.mean) != extractor.dim:
            raise PraError(
                f"the reference {self.name} has {len(self.pool.mean)} features, {extractor.name} makes "
                f"{extractor.dim}; give statistics of {extractor.name}"
            )

    @property
    def sha256(self) -> str:
        """Of means and covariances, whatever file they came from."""
        digest = hashlib.sha256()
        for array in (*self.pool, *(self.spatial or ())):
            digest.update(np.ascontiguousarray(array, "<f8").data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """For a report's provenance."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "file_sha256": self.file_sha256,
            "count": self.count,
            "images_sha256": self.images_sha256,
            "shape": self.shape and list(self.shape),
            "fit": self.fit,
            "prepared": self.prepared,
            "kept_features": 0 if self.kept is None else len(self.kept),
        }

    def save(self, path: Path) -> None:
        """Writes ``mu``, ``sigma`` (and ``mu_s``, ``sigma_s``) as ADM's evaluator reads them, and what else is known.

        Raises:
            PraError: the disk is full or refuses.
        """
        known = {
            "format": FORMAT, "name": self.name, "features": self.features, "fingerprint": self.fingerprint,
            "shape": self.shape, "fit": self.fit, "count": self.count, "prepared": self.prepared,
            "images_sha256": self.images_sha256,
        }  # fmt: skip
        arrays: dict[str, Any] = {
            "mu": self.pool.mean,
            "sigma": self.pool.covariance,
            "pra": np.array(json.dumps(known)),
        }
        if self.spatial:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.kept is not None:
            arrays["features"] = self.kept.numpy()
        write_atomically(path, lambda file: np.savez(file, **arrays))


def summarise(collector: Collector, name: str, fit: str | None) -> Reference:
    """A collected set as the reference for others."""
    return Reference(
        name=name,
        features=collector.extractor.name,
        fingerprint=collector.extractor.fingerprint,
        shape=collector.shape,
        fit=fit,
        count=collector.count,
        pool=gaussian(collector.pool),
        spatial=gaussian(collector.spatial) if collector.spatial else None,
        kept=collector.kept,
        images_sha256=collector.images_sha256,
    )


def from_source(
    source: Source,
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    extractor: FeatureExtractor,
    keep: int = 50_000,
    batch_size: int = 256,
    progress: bool = True,
    world: World = ALONE,
) -> Reference:
    """The statistics of all images of a source, prepared as for training without augmentation.

    With ``config.fit`` at its default the preparation is ADM's centre crop.

    Args:
        source: the set.
        size: height and width of the images to be judged.
        channels: theirs.
        config: how the source's images are brought to that.
        extractor: makes the features.
        keep: single features to keep, evenly spread over the source.
        batch_size: images at a time.
        progress: whether to show a bar.
        world: the processes that share the work; all get the statistics.

    Raises:
        PraError: fewer than 2 images, or images that cannot be prepared.
    """
    count = len(source)
    with reading(prepared(source, range(count), size, channels, config, batch_size, world.share(count))) as batches:
        collected = _collected(batches, extractor, count, keep, progress, world, source.name, config.fit.value)
    how = {"on_small": config.on_small.value, "on_corrupt": config.on_corrupt.value}
    return replace(collected, prepared=how)


def _collected(
    batches: Iterable[Batch],
    extractor: FeatureExtractor,
    count: int,
    keep: int,
    progress: bool,
    world: World,
    name: str,
    fit: str | None,
) -> Reference:
    unlabelled = (batch._replace(labels=None) for batch in batches)  # whose accuracy is not asked for
    share = collect(unlabelled, extractor, count, keep, progress, what="reference", world=world)

    def all_of(shares: list[Collected]) -> Reference:
        return summarise(merged(shares)[Protocol.TORCH_FIDELITY], name, fit)

    return world.combine(share, all_of)


def from_file(
    path: Path, extractor: FeatureExtractor, keep: int = 50_000, progress: bool = True, world: World = ALONE
) -> Reference:
    """The statistics in a file, or those of the images in it.

    Our own files say what they are of. Others, with the keys ``mu`` and ``sigma`` (ADM, torch-fidelity, JiT), are taken
    to be of Inception; where ADM's hold images too (``arr_0``), precision, recall and KID are measured by those.

    Args:
        path: ``.npz``.
        extractor: makes the features of the images in the file, if any.
        keep: single features to keep.
        progress: whether to show a bar.
        world: the processes that share the images, if any; all get the statistics.

    Raises:
        PraError: a file that cannot be read, without these keys, or of other features.
    """
    arrays = _read(path)
    if "pra" in arrays:
        return _ours(path, arrays)
    if "mu" in arrays and extractor.name != "inception":
        raise PraError(f"{path} does not say which features its statistics are of; use --features inception")
    pool = _gaussian(path, arrays, "") if "mu" in arrays else None
    spatial = _gaussian(path, arrays, "_s") if "mu_s" in arrays else None
    measured = None
    if "arr_0" in arrays:
        images = NpzBatch(path)
        batches = images.batches(256, world.share(images.count))
        measured = _collected(batches, extractor, images.count, keep, progress, world, str(path), None)
    if pool is None:
        assert measured is not None, "_read has seen one of both"
        return measured
    return Reference(
        name=str(path),
        features="inception",
        fingerprint=None,
        shape=measured.shape if measured else None,
        fit=None,
        count=None,
        pool=pool,
        spatial=spatial,
        kept=measured.kept if measured else None,
        file_sha256=file_sha256(path),
    )


def recorded_features(path: Path) -> tuple[str, str] | None:
    """Name and fingerprint of the extractor that made a file of our own; None for the files of others.

    Raises:
        PraError: a file that cannot be read, or with neither statistics nor images.
    """
    arrays = _read(path)
    if "pra" not in arrays:
        return None
    known = _known(path, arrays)
    return known["features"], known["fingerprint"]


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The statistics in a file; of images only the name."""
    with explained(path, "cannot be read as .npz", "give statistics, a batch, or a data source"):
        arrays = read_arrays(path, ("pra", *_NUMBERS))
    if not ({"mu", "sigma"} <= arrays.keys() or "arr_0" in arrays):
        raise PraError(
            f"{path} holds neither statistics (mu, sigma) nor images (arr_0) but {listed(arrays)}; "
            "give statistics, a batch, or a data source"
        )
    return arrays


def _known(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """How the extractor and the images are described in a file of our own, checked."""
    with explained(path, "is damaged: its description cannot be read", "make it anew"):
        known: dict[str, Any] = json.loads(str(arrays["pra"]))
        if not isinstance(known, dict):
            raise ValueError(f"{type(known).__name__} in place of an object")
    if known.get("format") != FORMAT:
        raise PraError(f"{path} is of format {known.get('format')!r}, this pra reads {FORMAT}; install a newer pra")
    for key, types in _DESCRIPTION.items():
        if key not in known or not isinstance(known[key], types):
            raise PraError(f"{path} is damaged: its description has {key} {known.get(key)!r}; make it anew")
    shape, nameless = known["shape"], known["fingerprint"] is None and known["features"] != "inception"
    if nameless or (shape is not None and [type(side) for side in shape] != [int] * 3):
        raise PraError(f"{path} is damaged: its description lacks the fingerprint or has shape {shape}; make it anew")
    return known


def _ours(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> Reference:
    known, pool = _known(path, arrays), _gaussian(path, arrays, "")
    return Reference(
        name=f"{path} ({known['name']})",
        features=known["features"],
        fingerprint=known["fingerprint"],
        shape=known["shape"] and tuple(known["shape"]),
        fit=known["fit"],
        count=known["count"],
        pool=pool,
        spatial=_gaussian(path, arrays, "_s") if "mu_s" in arrays else None,
        kept=_kept(path, arrays["features"], len(pool.mean)) if "features" in arrays else None,
        file_sha256=file_sha256(path),
        prepared=known.get("prepared"),  # older files know neither
        images_sha256=known.get("images_sha256"),
    )


def _kept(path: Path, features: npt.NDArray[Any], dim: int) -> Tensor:
    if features.dtype.kind != "f" or features.ndim != 2 or features.shape[1] != dim:
        raise PraError(f"{path}: features is {features.dtype} {features.shape}, not numbers (n, {dim}); make it anew")
    if not np.isfinite(features).all():
        raise PraError(f"{path}: features holds numbers that are not finite; make it anew")
    return from_numpy(features.astype(np.float32))


def _gaussian(path: Path, arrays: dict[str, npt.NDArray[Any]], suffix: str) -> Gaussian:
    """``mu`` and ``sigma`` with this suffix, checked."""
    mean, covariance = (arrays.get(f"{name}{suffix}", np.empty(0)) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise PraError(f"{path}: mu{suffix} is {mean.shape} and sigma{suffix} {covariance.shape}, not (D,) and (D, D)")
    if {mean.dtype.kind, covariance.dtype.kind} - set("fiu"):
        raise PraError(f"{path}: mu{suffix} is {mean.dtype} and sigma{suffix} {covariance.dtype}, not real numbers")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise PraError(f"{path}: mu{suffix} or sigma{suffix} holds numbers that are not finite; get the file again")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
