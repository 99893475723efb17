"""Figures of a set of images against a reference, and of a codec's reconstructions."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pra.config import CodecConfig
from pra.errors import PraError
from pra.evaluation import metrics
from pra.evaluation.collect import Collected, Collector, collect, merged
from pra.evaluation.comparable import comparable_sha256
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.metrics import KID_SIZE, KID_SUBSETS, NEIGHBOURS, SEED, Balls, Moments, Protocol, frechet_distance
from pra.evaluation.reference import Reference
from pra.models import Model
from pra.sampling.batches import Batch
from pra.utils.distributed import ALONE, World
from pra.utils.files import write_atomically
from pra.utils.pixels import from_uint8, to_uint8
from pra.utils.progress import Progress
from pra.utils.provenance import package_version

PACKAGES = {"inception": ("torch-fidelity", "torchvision"), "dinov2": ("timm", "torchvision", "pillow")}
"""Packages besides torch and NumPy that affect an extractor's figures."""

FEW = 2_000
"""Fewer images than this get a line about their effect on FID."""

Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures by protocol, or under "reconstruction", and the provenance to repeat them.

    A figure is None where the features or the number of images do not allow one.
    """

    figures: dict[str, Figures]
    provenance: dict[str, Any]

    def to_json(self) -> str:
        """Return the report as JSON; figures that are not finite are null."""
        finite = {
            column: {k: v if v is None or math.isfinite(v) else None for k, v in figures.items()}
            for column, figures in self.figures.items()
        }
        return json.dumps({"figures": finite, "provenance": self.provenance}, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        write_atomically(path, lambda file: file.write(self.to_json().encode()))

    def table(self) -> str:
        """Return a line per figure, a column per protocol."""
        widths = {column: max(12, len(column)) for column in self.figures}
        lines = [" " * 22 + "  ".join(f"{column:>{width}}" for column, width in widths.items())]
        for name in dict.fromkeys(name for figures in self.figures.values() for name in figures):
            values = {column: self.figures[column].get(name) for column in widths}
            cells = {column: "-" if value is None else f"{value:.5g}" for column, value in values.items()}
            lines.append(f"{name:<22}" + "  ".join(f"{cells[column]:>{width}}" for column, width in widths.items()))
        return "\n".join(lines)


def warn_of_few(count: int) -> None:
    """Warn that few images raise FID."""
    if count < FEW:
        print(
            f"{count} images are few: fewer images raise FID (Chong and Forsyth, arXiv 1911.07023). Compare only FIDs "
            "of as many images"
        )


def describe(extractor: FeatureExtractor, reference: Reference, count: int, keep: int = 50_000) -> dict[str, Any]:
    """Return the provenance of a report that does not depend on the images, their hash of comparability in it."""
    features: dict[str, Any] = {
        "name": extractor.name,
        "sha256": extractor.fingerprint,
        "device": str(extractor.device),
        "versions": {package: package_version(package) for package in PACKAGES.get(extractor.name, ())},
    }
    if extractor.classes:
        features |= {"classes": len(extractor.classes), "held_out_accuracy": extractor.accuracy}
    smallest = min(len(reference.kept), keep, count) if reference.kept is not None else 0
    known = {
        "features": features,
        "reference": reference.describe(),
        "count": count,
        "kept_features": min(keep, count),
        "seed_of_subsets": SEED,
        "kid": {"subsets": KID_SUBSETS, "size": min(KID_SIZE, smallest)},
        "precision_recall": {"neighbours": NEIGHBOURS},
    }
    return known | {"comparable_sha256": comparable_sha256(known)}


def evaluate(
    batches: Iterable[Batch],
    reference: Reference,
    extractor: FeatureExtractor,
    count: int,
    keep: int = 50_000,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
    world: World = ALONE,
    what: str = "evaluate",
    patch_size: int | None = None,
) -> Report:
    """Judge a set of images by a reference, under both protocols.

    Memory grows with the number of images only by 16 bytes each and by the features of at most ``keep`` of them. No
    figure depends on the batches beyond rounding.

    Args:
        batches: the set, or this process's share of it; uint8, or in [-1, 1].
        reference: made by the same extractor.
        extractor: makes the features.
        count: images in the whole set, at least 2.
        keep: features to keep for KID, precision and recall.
        provenance: further fields of the report.
        progress: whether to show bars.
        world: the processes that share the set; all get the report.
        what: the bar's name.
        patch_size: that of the model that made the images, if known; "seams" needs it.

    Raises:
        PraError: a reference of another extractor or of images of another size, or another number of images.
    """
    reference.check(extractor)
    collected = collect(batches, extractor, count, keep, progress, what, world, reference.shape)

    def measured(parts: list[Collected]) -> tuple[dict[str, Figures], dict[str, str]]:
        whole, figures, identities = merged(parts), {}, {}
        costly = {collector: _figures(collector, reference, patch_size) for collector in whole.values()}
        for protocol in Protocol:
            collector = whole.get(protocol, whole[Protocol.TORCH_FIDELITY])
            mean, deviation = collector.inception_score(protocol) or (None, None)
            scores: Figures = {"inception_score": mean, "inception_score_std": deviation}
            figures[protocol.value] = costly[collector] | scores
            identities[protocol.value] = collector.images_sha256
        return figures, identities

    figures, identities = world.combine(collected, measured)
    known = describe(extractor, reference, count, keep) | {"images_sha256": identities}
    return Report(figures, known | dict(provenance or {}))


def _figures(collector: Collector, reference: Reference, patch_size: int | None) -> Figures:
    kept, truth = reference.kept, reference.balls(collector.extractor.device)
    pool: Moments = collector.sums["pool"]
    spatial: Moments | None = collector.sums.get("spatial")
    figures: Figures = {"fid": frechet_distance(*pool.gaussian, *reference.pool), "sfid": None}
    if spatial and reference.spatial:
        own, there = len(spatial.mean), len(reference.spatial[0])
        if own == there:
            figures["sfid"] = frechet_distance(*spatial.gaussian, *reference.spatial)
        else:  # the other figures took long
            warnings.warn(f"no sFID: {reference.name} has {there} spatial features, not {own}", stacklevel=2)
    if kept is not None and min(len(kept), collector.keep) >= 2:
        figures["kid"], figures["kid_std"] = metrics.kernel_distance(collector.kept.numpy(), kept.numpy())
    if truth is not None and collector.keep > NEIGHBOURS:
        figures |= metrics.overlap(Balls(collector.kept.to(truth.points.device), NEIGHBOURS, truth.centre), truth)
    if patch_size and reference.steps is not None:
        figures["seams"] = seams(collector, reference.steps, patch_size)
    return figures | ({} if collector.accuracy is None else {"accuracy": collector.accuracy})


def seams(collector: Collector, real: metrics.Array, patch_size: int) -> float | None:
    """Return the seam ratio of the collected images over that of real images of the same size; 1 means no seams.

    ``real`` and the collector's sums are from :func:`pra.evaluation.metrics.neighbour_steps`.
    """
    assert collector.shape is not None, "images have been collected"
    _, *size = collector.shape
    own, truth = (
        metrics.seam_ratio(steps, (size[0], size[1]), patch_size) for steps in (collector.sums["steps"], real)
    )
    return own / truth if own and truth else None


def reconstruct(
    model: Model,
    batches: Iterable[Batch],
    extractor: FeatureExtractor,
    count: int,
    progress: bool = True,
    world: World = ALONE,
) -> Figures:
    """Measure how well a model's codec keeps ``count`` real images with labels, uint8, of the model's size.

    Returns:
        "reconstruction_fid" and "reconstruction_seams" between the reconstructions and the same images; "psnr" (dB) and
        "ssim", means over the images, the latter None where they are smaller than its window.

    Raises:
        PraError: a model without a codec, or another number of images than announced.
    """
    check_codec(model)
    originals, copies = Collector(extractor, count, 0), Collector(extractor, count, 0)
    large = min(model.config.image_size) >= metrics.SSIM_WINDOW
    signal = similarity = 0.0
    hidden, total = not (progress and world.is_first), len(world.share(count))
    with Progress(total=total, unit="image", desc="reconstruct", disable=hidden) as bar:
        for images, labels, start in batches:
            assert labels is not None, "the encoder sees the labels"
            copy = to_uint8(model.reconstruct(from_uint8(images).to(model.device), labels.to(model.device))).cpu()
            originals.add(images, None, start)
            copies.add(copy, None, start)
            signal += float(metrics.psnr(images, copy).sum())
            similarity += float(metrics.ssim(images, copy).sum()) if large else 0.0
            bar.update(len(images))

    def finish(parts: list[tuple[Collector, Collector, float, float]]) -> Figures:
        for other_originals, other_copies, *_ in parts[1:]:
            originals.merge(other_originals)
            copies.merge(other_copies)
        copies.check_complete()
        return {
            "reconstruction_fid": frechet_distance(*copies.sums["pool"].gaussian, *originals.sums["pool"].gaussian),
            "psnr": sum(part[2] for part in parts) / count,
            "ssim": sum(part[3] for part in parts) / count if large else None,
            "reconstruction_seams": seams(copies, originals.sums["steps"], model.config.patch_size),
        }

    return world.combine((originals, copies, signal, similarity), finish)


def check_codec(model: Model) -> CodecConfig:
    """Return a model's codec; refuse a model that writes pixels directly."""
    if model.config.codec is None:
        raise PraError("this model does not have a codec. Leave --reconstruction out", "unsupported")
    return model.config.codec
