"""Reference statistics: from a data source, from ADM's, torch-fidelity's or JiT's files, or from our own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, from_numpy

from pra.config import DataConfig
from pra.data import Source
from pra.errors import PraError
from pra.evaluation.collect import Collected, collect, merged
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.metrics import NEIGHBOURS, Array, Balls, Protocol
from pra.evaluation.samples import prepared
from pra.sampling.batches import Batch, NpzBatch
from pra.utils.distributed import ALONE, World
from pra.utils.files import check_fields, explained, listed, parse_json, read_arrays, unreadable, write_atomically
from pra.utils.provenance import file_sha256

FORMAT = 1
_NUMBERS = ("mu", "sigma", "mu_s", "sigma_s", "features", "steps")
DESCRIPTION: dict[str, Any] = {
    "name": str,
    "features": str,
    "fingerprint": str | None,
    "shape": tuple[int, ...] | None,
    "fit": str | None,
    "count": int | None,
    "prepared": dict | None,
    "images_sha256": str | None,
}
"""Fields of a reference, with their types, that our own files keep beside the numbers."""
LARGEST = 1e15
"""Numbers of features and of their statistics lie far below: no square or distance of them overflows float32."""
TOLERANCE = 1e-3
"""A covariance in float32 may miss symmetry and a least eigenvalue of 0 by rounding, relative to its largest number."""


Gaussian = tuple[Array, Array]
"""Mean ``(D,)`` and covariance ``(D, D)``, float64."""


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, seen through an extractor. Fields that a file lacks are None.

    ``features`` and ``fingerprint`` name the extractor; ``shape`` ``(C, H, W)``, ``fit`` and ``prepared`` say how the
    images were prepared. ``spatial`` serves sFID; ``kept`` ``(n, D)``, features of single images, serve KID, precision
    and recall; ``steps`` (:func:`pra.evaluation.metrics.neighbour_steps`) serve seams. ``images_sha256`` is
    :func:`pra.evaluation.collect.digest_sum` of the prepared images.
    """

    name: str
    features: str
    pool: Gaussian
    fingerprint: str | None = None
    shape: tuple[int, ...] | None = None
    fit: str | None = None
    count: int | None = None
    spatial: Gaussian | None = None
    kept: Tensor | None = None
    steps: Array | None = None
    file_sha256: str | None = None
    prepared: dict[str, Any] | None = None
    images_sha256: str | None = None
    _balls: dict[torch.device, Balls] = field(default_factory=dict, init=False, repr=False, compare=False)

    def balls(self, device: torch.device) -> Balls | None:
        """Return the balls of precision and recall, made once; None where too few features are kept."""
        if self.kept is None or len(self.kept) <= NEIGHBOURS:
            return None
        place = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
        if place not in self._balls:
            self._balls[place] = Balls(self.kept.to(place))
        return self._balls[place]

    def check(self, extractor: FeatureExtractor) -> None:
        """Refuse another extractor than the one that made these statistics."""
        pairs = (
            ("features", self.features, extractor.name, f"Use --features {self.features}"),
            ("SHA-256 of features", self.fingerprint, extractor.fingerprint, "Give those weights with --weights"),
            ("size of features", len(self.pool[0]), extractor.dim, f"Give statistics of {extractor.name}"),
        )
        for what, own, now, fix in pairs:
            if own not in (None, now):
                own, now = str(own)[:12], str(now)[:12]
                problem = f"the reference {self.name} has the {what} {own}, not {now}"
                raise PraError(f"{problem}. {fix}", "mismatch", reference=own, features=now)

    @property
    def sha256(self) -> str:
        """Return the hash of means and covariances, whatever file they came from."""
        digest = hashlib.sha256()
        for array in (*self.pool, *(self.spatial or ())):
            digest.update(np.ascontiguousarray(array, "<f8").data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the reference's part of a report's provenance."""
        names = ("name", "sha256", "file_sha256", "count", "images_sha256", "shape", "fit", "prepared")
        return {name: getattr(self, name) for name in names} | {
            "shape": self.shape and list(self.shape),
            "kept_features": 0 if self.kept is None else len(self.kept),
        }

    def save(self, path: Path) -> None:
        """Write ``mu``, ``sigma`` (and ``mu_s``, ``sigma_s``) as ADM's evaluator reads them, and all other fields."""
        known = {"format": FORMAT} | {name: getattr(self, name) for name in DESCRIPTION}
        arrays: dict[str, Any] = {"mu": self.pool[0], "sigma": self.pool[1]}
        if self.spatial:
            arrays |= {"mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        if self.kept is not None:
            arrays["features"] = self.kept.numpy()
        if self.steps is not None:
            arrays["steps"] = self.steps
        write_atomically(path, lambda file: np.savez(file, pra=np.array(json.dumps(known)), **arrays))


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
    """Gather the statistics of all images of a source, prepared as for training without augmentation.

    With ``config.fit`` at its default the preparation is ADM's centre crop. ``size`` (height and width) and
    ``channels`` are those of the images to be judged; ``keep`` single features are kept, evenly spread.

    Raises:
        PraError: fewer than 2 images, or images that cannot be prepared.
    """
    count = len(source)
    with closing(prepared(source, range(count), size, channels, config, batch_size, world.share(count))) as batches:
        gathered = from_batches(batches, extractor, count, source.name, keep, progress, world)
    how = {"on_small": config.on_small.value, "on_corrupt": config.on_corrupt.value}
    return replace(gathered, fit=config.fit.value, prepared=how)


def from_batches(
    batches: Iterable[Batch],
    extractor: FeatureExtractor,
    count: int,
    name: str,
    keep: int = 50_000,
    progress: bool = True,
    world: World = ALONE,
) -> Reference:
    """Gather the statistics of ``count`` uint8 images, or of this process's share; arguments as :func:`from_source`."""
    unlabelled = (batch._replace(labels=None) for batch in batches)  # real images need no accuracy
    share = collect(unlabelled, extractor, count, keep, progress, what="reference", world=world)

    def join(shares: list[Collected]) -> Reference:
        whole = merged(shares)[Protocol.TORCH_FIDELITY]
        gaussians = {name: whole.sums[name].gaussian for name in ("pool", "spatial") if name in whole.sums}
        return Reference(
            name=name,
            features=extractor.name,
            fingerprint=extractor.fingerprint,
            shape=whole.shape,
            count=count,
            kept=whole.kept,
            steps=whole.sums["steps"],
            images_sha256=whole.images_sha256,
            **gaussians,
        )

    return world.combine(share, join)


def from_file(
    path: Path, extractor: FeatureExtractor, keep: int = 50_000, progress: bool = True, world: World = ALONE
) -> Reference:
    """Read the statistics in a file, or gather those of the images in it.

    Our own files name their features. Other files with the keys ``mu`` and ``sigma`` (ADM, torch-fidelity, JiT) are
    taken to be of Inception. Images beside them (ADM's ``arr_0``) serve precision, recall and KID.

    Raises:
        PraError: a file that cannot be read, without these keys, or of other features.
    """
    arrays, known = _read(path)
    if not known and "mu" in arrays and extractor.name != "inception":
        raise PraError(f"{path} does not name its features. Use --features inception", "mismatch", path=path)
    pool = _gaussian(path, arrays, "", extractor.dim) if known or "mu" in arrays else None
    spatial = _gaussian(path, arrays, "_s") if "mu_s" in arrays else None
    kept = steps = None
    if known and known["shape"] and "steps" in arrays:
        steps = _numbers(path, arrays, "steps", (sum(known["shape"][1:]) - 2,)).astype(np.float64)
    if known and pool and "features" in arrays:
        kept = from_numpy(_numbers(path, arrays, "features", (None, len(pool[0]))).astype(np.float32))
    if not known and "arr_0" in arrays:
        images = NpzBatch(path)
        batches = images.batches(256, world.share(images.count))
        gathered = from_batches(batches, extractor, images.count, str(path), keep, progress, world)
        if pool is None:
            return gathered
        known, kept = {"shape": gathered.shape}, gathered.kept
    assert pool is not None, "_read has seen statistics or images"
    known = {"name": str(path), "features": "inception"} | known
    return Reference(**known, pool=pool, spatial=spatial, kept=kept, steps=steps, file_sha256=file_sha256(path))


def recorded_classifier(path: Path) -> str:
    """Return the fingerprint of the classifier that made a file of our own; refuse other files."""
    _, known = _read(path)
    if known.get("features") != "classifier":
        problem = f"{path} was not made by a classifier"
        raise PraError(f"{problem}. Use --features inception, or give the data source", "mismatch", path=path)
    return str(known["fingerprint"])


def _read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the statistics in a file (of images only the name) and its description, empty for other tools' files."""
    fix = "give statistics, a batch, or a data source"
    with explained(path, "cannot be read as .npz", fix):
        arrays = read_arrays(path, ("pra", *_NUMBERS))
    if "pra" not in arrays:
        if not ({"mu", "sigma"} <= arrays.keys() or "arr_0" in arrays):
            problem = f"holds neither statistics (mu, sigma) nor images (arr_0) but {listed(arrays)}"
            raise PraError(f"{path} {problem}. {fix.capitalize()}", "unreadable", path=path)
        return arrays, {}
    with explained(path, "is damaged", "write it again"):
        known: dict[str, Any] = {"prepared": None, "images_sha256": None}  # missing from older files
        known |= check_fields(parse_json(str(arrays["pra"]).encode(), path), path)
        if known.pop("format", None) != FORMAT:
            raise PraError(f"{path} has another format than {FORMAT}. Install a newer pra", "unsupported", path=path)
        check_fields(known, path, **DESCRIPTION)
        if not known.keys() >= DESCRIPTION.keys():
            raise ValueError(f"it describes {listed(known)}")
        if known["fingerprint"] is None and known["features"] != "inception":
            raise ValueError("it lacks the fingerprint of its features")
        known = {name: known[name] for name in DESCRIPTION} | {"name": f"{path} ({known['name']})"}
        known["shape"] = known["shape"] and tuple(known["shape"])
    return arrays, known


def _gaussian(path: Path, arrays: dict[str, npt.NDArray[Any]], suffix: str, size: int | None = None) -> Gaussian:
    """Return ``mu`` and ``sigma`` with this suffix, checked. Eigenvalues take long: not those of another ``size``."""
    mean = _numbers(path, arrays, f"mu{suffix}", (None,)).astype(np.float64)
    covariance = _numbers(path, arrays, f"sigma{suffix}", 2 * mean.shape).astype(np.float64)
    if size in (None, len(mean)):
        allowed = TOLERANCE * np.abs(covariance).max(initial=0.0)
        least = np.linalg.eigvalsh(covariance).min(initial=0.0)
        symmetric = np.abs(covariance - covariance.T).max(initial=0.0) <= allowed
        if not symmetric or least < -allowed:
            problem = f"has the eigenvalue {least:.3g}" if symmetric else "is not symmetric"
            raise unreadable(path, f"is not of a distribution: its array sigma{suffix} {problem}. Get the file again")
    return mean, covariance


def _numbers(
    path: Path, arrays: dict[str, npt.NDArray[Any]], name: str, shape: tuple[int | None, ...]
) -> npt.NDArray[Any]:
    """Return an array of finite real numbers, up to :data:`LARGEST`, of this shape; None stands for any length."""
    array = arrays.get(name, np.empty((0, 0, 0)))
    fits = len(shape) == array.ndim and all(side in (None, own) for side, own in zip(shape, array.shape, strict=True))
    usable = fits and array.dtype.kind in "fiu"
    if not usable or not -LARGEST <= float(array.min(initial=0)) <= float(array.max(initial=0)) <= LARGEST:  # or nan
        expected = f"finite numbers up to {LARGEST:g} of shape {shape}".replace("None", "n")
        problem = f"its array {name} is {array.dtype} {array.shape}, not {expected}"
        raise PraError(f"{path}: {problem}. Get the file again", "unreadable", path=path, name=name)
    return array
