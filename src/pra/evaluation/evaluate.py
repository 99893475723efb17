"""From images to figures: a set of images against a reference, and a codec's reconstructions against the originals."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pra.config import CodecConfig
from pra.errors import PraError
from pra.evaluation.collect import Collected, Collector, collect, merged, shape_text
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.metrics import (
    KID_SIZE,
    KID_SUBSETS,
    NEIGHBOURS,
    SEED,
    SSIM_WINDOW,
    Balls,
    frechet_distance,
    kernel_distance,
    overlap,
    psnr,
    ssim,
)
from pra.evaluation.reference import Reference, gaussian
from pra.models import Model
from pra.sampling.batches import Batch
from pra.utils.distributed import ALONE, World
from pra.utils.files import write_atomically
from pra.utils.pixels import from_uint8, to_uint8
from pra.utils.progress import Progress
from pra.utils.provenance import package_version

PACKAGES = {"inception": ("torch-fidelity", "torchvision"), "dinov2": ("timm", "torchvision", "pillow")}
"""Whose code decides an extractor's figures, beside torch and numpy."""

FEW = 2_000
"""Images below which a line says what that does to FID."""

Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures and what they were made of.

    ``figures`` by protocol, or under "reconstruction"; None where the features or the number of images do not allow
    one. ``provenance`` says all that is needed to repeat them.
    """

    figures: dict[str, Figures]
    provenance: dict[str, Any]

    def to_json(self) -> str:
        """The report as JSON; figures that are not finite are null."""
        finite = {
            column: {k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}
            for column, figures in self.figures.items()
        }
        return json.dumps({"figures": finite, "provenance": self.provenance}, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Writes the JSON, whole or not at all.

        Raises:
            PraError: the disk is full or refuses.
        """
        write_atomically(path, lambda file: file.write(self.to_json().encode()))

    def table(self) -> str:
        """A line per figure, a column per protocol."""
        names = list(dict.fromkeys(name for figures in self.figures.values() for name in figures))
        widths = [max(12, len(column)) for column in self.figures]
        lines = [" " * 22 + "  ".join(f"{c:>{w}}" for c, w in zip(self.figures, widths, strict=True))]
        for name in names:
            cells = [_cell(figures.get(name)) for figures in self.figures.values()]
            lines.append(f"{name:<22}" + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
        return "\n".join(lines)


def told_of_few(count: int) -> None:
    """Prints what so few images do to FID, where they are few."""
    if count < FEW:
        print(
            f"{count} images are few: FID is the higher, the fewer there are (Chong and Forsyth, arXiv 1911.07023); "
            "compare it with that of as many images only"
        )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def evaluate(
    batches: Iterable[Batch],
    reference: Reference,
    extractor: FeatureExtractor,
    count: int,
    keep: int = 50_000,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
    world: World = ALONE,
) -> Report:
    """Judges a set of images by a reference, under both protocols.

    Memory does not grow with the number of images but for the features of at most ``keep`` of them (KID, precision,
    recall) and 16 bytes each for the Inception Score. No figure depends on the batches beyond rounding.

    Args:
        batches: the set, or this process's share of it; uint8, or in [-1, 1].
        reference: what to hold it against, made by the same extractor.
        extractor: makes the features.
        count: images in the set, at least 2.
        keep: features to keep.
        provenance: what the caller knows about the images and itself, for the report.
        progress: whether to show bars.
        world: the processes that share the set; all get the report.

    Raises:
        PraError: a reference of another extractor or of images of another size, another number of images than
            announced, or fewer than 2.
    """
    reference.check(extractor)
    collected = collect(_checked(batches, reference), extractor, count, keep, progress, world=world)

    def measured(parts: list[Collected]) -> tuple[dict[str, Figures], dict[str, str]]:
        whole = merged(parts)
        identities = {protocol.value: collector.images_sha256 for protocol, collector in whole.items()}
        return _figures(whole, reference, progress), identities

    figures, identities = world.combine(collected, measured)
    smallest = min(len(reference.kept), keep, count) if reference.kept is not None else 0
    known = {
        "features": _describe(extractor),
        "reference": reference.describe(),
        "count": count,
        "images_sha256": identities,
        "kept_features": min(keep, count),
        "seed_of_subsets": SEED,
        "kid": {"subsets": KID_SUBSETS, "size": min(KID_SIZE, smallest)},
        "precision_recall": {"neighbours": NEIGHBOURS},
    }
    return Report(figures, known | dict(provenance or {}))


def _figures(collectors: Collected, reference: Reference, progress: bool) -> dict[str, Figures]:
    # Where both protocols share their images, the costly figures are made once; and what is the reference's, always.
    distinct = {id(collector): collector for collector in collectors.values()}
    extractor = next(iter(distinct.values())).extractor
    truth = reference.balls(extractor.device, progress)
    shared = {key: compare(collector, reference, truth, progress) for key, collector in distinct.items()}
    figures = {}
    for protocol, collector in collectors.items():
        score = collector.scores[protocol].result()
        scores: Figures = {
            "inception_score": score[0] if score else None,
            "inception_score_std": score[1] if score else None,
        }
        figures[protocol.value] = shared[id(collector)] | scores
    return figures


def compare(collector: Collector, reference: Reference, truth: Balls | None, progress: bool = False) -> Figures:
    """All figures of a set but the Inception Score; ``truth`` of the reference's kept features, if there are enough."""
    kept = reference.kept
    figures: Figures = {}
    pairs = {"fid": (collector.pool, reference.pool), "sfid": (collector.spatial, reference.spatial)}
    for name, (own, real) in Progress(pairs.items(), desc="FID", leave=False, disable=not progress):
        figures[name] = None if own is None or real is None else frechet_distance(*gaussian(own), *real)
    if kept is not None and min(len(kept), collector.keep) >= 2:
        figures["kid"], figures["kid_std"] = kernel_distance(collector.kept.numpy(), kept.numpy(), progress=progress)
    if truth is not None and collector.keep > NEIGHBOURS:
        samples = Balls(collector.kept.to(truth.points.device), NEIGHBOURS, truth.centre, progress)
        figures |= overlap(samples, truth, progress)._asdict()
    return figures | ({} if collector.accuracy is None else {"accuracy": collector.accuracy})


def _checked(batches: Iterable[Batch], reference: Reference) -> Iterable[Batch]:
    for batch in batches:
        shape = tuple(batch.images.shape[1:])
        if reference.shape is not None and shape != reference.shape:
            raise PraError(
                f"the images are {shape_text(shape)} (channels x height x width) and those of the reference "
                f"{reference.name} {shape_text(reference.shape)}; bring both to one size and number of channels"
            )
        yield batch


@dataclasses.dataclass
class _Copies:
    """Sums over images and their reconstructions, of which processes may each have a share."""

    originals: Collector
    copies: Collector
    signal: float = 0.0
    similarity: float = 0.0

    def figures(self, others: Iterable[_Copies]) -> Figures:
        """Those of all shares together."""
        for other in others:
            self.originals.merge(other.originals)
            self.copies.merge(other.copies)
            self.signal += other.signal
            self.similarity += other.similarity
        self.copies.check_complete()
        count, shape = self.copies.count, self.copies.shape
        assert shape is not None, "a complete set has images"
        return {
            "reconstruction_fid": frechet_distance(*gaussian(self.copies.pool), *gaussian(self.originals.pool)),
            "psnr": self.signal / count,
            "ssim": self.similarity / count if min(shape[1:]) >= SSIM_WINDOW else None,
        }


def reconstruct(
    model: Model,
    batches: Iterable[Batch],
    extractor: FeatureExtractor,
    count: int,
    progress: bool = True,
    world: World = ALONE,
) -> Figures:
    """How well a model's codec keeps real images.

    Args:
        model: with learned states.
        batches: real images, uint8, of the model's size, with labels; or this process's share of them.
        extractor: makes the features.
        count: images in all, at least 2.
        progress: whether to show a bar.
        world: the processes that share the images; all get the figures.

    Returns:
        "reconstruction_fid", between the reconstructions and the same images; "psnr" (dB) and "ssim", means over the
        images; None for the latter where the images are smaller than its window.

    Raises:
        PraError: a model without a codec, or another number of images than announced.
    """
    check_codec(model)
    seen = _Copies(Collector(extractor, count, 0), Collector(extractor, count, 0))
    large = min(model.config.image_size) >= SSIM_WINDOW
    hidden, total = not (progress and world.is_first), len(world.share(count))
    with Progress(total=total, unit="image", desc="reconstruct", disable=hidden) as bar:
        for images, labels, start in batches:
            assert labels is not None, "the encoder sees the labels"
            copy = to_uint8(model.reconstruct(from_uint8(images).to(model.device), labels.to(model.device))).cpu()
            seen.originals.add(images, None, start)
            seen.copies.add(copy, None, start)
            seen.signal += float(psnr(images, copy).sum())
            seen.similarity += float(ssim(images, copy).sum()) if large else 0.0
            bar.update(len(images))
    return world.combine(seen, lambda parts: parts[0].figures(parts[1:]))


def check_codec(model: Model) -> CodecConfig:
    """What a model reconstructs with.

    Raises:
        PraError: it writes pixels directly.
    """
    if model.config.codec is None:
        raise PraError("this model writes its patches directly, without a codec; leave --reconstruction out")
    return model.config.codec


def _describe(extractor: FeatureExtractor) -> dict[str, Any]:
    known: dict[str, Any] = {"name": extractor.name, "sha256": extractor.fingerprint, "device": str(extractor.device)}
    known["versions"] = {package: package_version(package) for package in PACKAGES.get(extractor.name, ())}
    if extractor.classes:
        known["classes"] = len(extractor.classes)
        known["held_out_accuracy"] = extractor.accuracy
    return known
