"""The command ``pra eval``: thin."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

import pra.weights
from pra.config import DataConfig, Precision, RunConfig, SamplingConfig, apply_settings, from_dict
from pra.config.checks import member
from pra.data import open_source
from pra.distributed import World, join
from pra.errors import PraError, nearest
from pra.eval.classifier import Classifier, find_classifier, fit_classifier
from pra.eval.dinov2 import dinov2
from pra.eval.evaluate import Report, check_codec, evaluate, reconstruct
from pra.eval.features import FeatureExtractor, inception
from pra.eval.reference import Reference, from_file, from_source, recorded_features
from pra.eval.samples import (
    Batch,
    NpzBatch,
    exported,
    how_sampled,
    join_exports,
    picture_shape,
    pictures,
    prepared,
    sampled,
    spread,
)
from pra.generate import Sampler
from pra.generate.requests import Numbered
from pra.hub.download import is_address
from pra.models import Model
from pra.options import File, Flag, Integer, Settings, Text
from pra.provenance import environment, file_sha256

EXTRACTORS = ("classifier", "dinov2", "inception")
OF_A_RUN = 50_000
"""Images sampled from a run where --num does not say."""


@dataclasses.dataclass(frozen=True)
class Adjustable:
    """What ``--set`` reaches: how reference images are prepared, and how a model samples."""

    data: DataConfig
    sampling: SamplingConfig


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is judged: ``count`` images of one shape, and how to get some of them in batches of a given size.

    ``target`` is as it was given; ``model`` is None where the images are ready.
    """

    target: Path
    count: int
    size: tuple[int, int]
    channels: int
    settings: Adjustable
    batches: Callable[[range, int], Iterator[Batch]]
    provenance: dict[str, Any]
    model: Model | None = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files to write, if any."""

    report: Path | None
    images: Path | None
    statistics: Path | None

    def check(self) -> None:
        """Refuses what would overwrite or cannot be written, before any work is done."""
        for path in (self.report, self.images, self.statistics):
            if path is None:
                continue
            folder = path.absolute().parent
            if os.path.lexists(path):
                raise PraError(f"{path} exists already; choose another file or remove it")
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise PraError(f"{path} cannot be written: {folder} is not there or not writable")


@dataclasses.dataclass(frozen=True)
class Work:
    """Where and in which portions it is done."""

    world: World
    device: torch.device
    batch_size: int


def evaluate_command(
    target: Annotated[Positional[Path], arg(metavar="RUN|DIR|FILE.npz")],
    *,
    reference: Text = None,
    features: Annotated[str, arg(metavar="|".join(EXTRACTORS))] = "inception",
    num: Integer = None,
    reconstruction: Flag = False,
    export_npz: File = None,
    export_statistics: File = None,
    weights: File = None,
    out: File = None,
    batch_size: int = 256,
    precision: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "auto",
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Judge generated images: FID, sFID, Inception Score, KID, precision and recall.

    Two ways to measure are shown side by side, ADM's and torch-fidelity's: they round and split differently.
    Several GPUs share the work: torchrun --nproc-per-node 8 -m pra -- eval RUN ... Killed, it begins anew: make many
    images with pra sample --num, which goes on, and judge the FILE.npz.

    Args:
        target: A run, saved model or hub:user/model to sample from, a folder of pictures, or a batch in ADM's layout.
        reference: A data source such as digits or folder:PATH, or a FILE.npz of statistics or images. By default the
            data that the run learnt from.
        features: inception; dinov2, whose fid is FD-DINOv2; or classifier: a small network fitted on the reference,
            once.
        num: Images to judge; by default 50000 of a run, and all that DIR or FILE.npz holds.
        reconstruction: Also judge the codec's reconstructions of as many real images.
        export_npz: Also write the images as the batch that ADM's evaluator reads.
        export_statistics: Also write the reference's statistics, to be given as --reference next time.
        weights: The features' weights, where they are not to be downloaded or fitted.
        out: Write figures and provenance as JSON.
        batch_size: Images at a time; no figure depends on it.
        precision: Of a run's matrix products while it samples: auto is bfloat16 on GPUs that have it, else float32.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: How reference images are prepared and a run samples, such as data.fit=pad or sampling.guidance=2; may
            be repeated.
    """
    outputs = Outputs(out, export_npz, export_statistics)
    with join() as world:
        outputs.check()
        _check_options(features, batch_size, num)
        arithmetic = member(Precision, precision, "--precision")
        work = Work(world, world.device(device), batch_size)
        subject = _open(target.expanduser(), num, work, arithmetic, settings)
        spec = _reference_of(subject, reference)
        if reconstruction:
            _check_reconstruction(spec, subject)
        judge = _extractor(features, weights, spec, subject, work)
        truth = _reference(spec, judge, subject, work)
        if outputs.statistics and world.leads:
            truth.save(outputs.statistics)
        report = _judged(subject, truth, judge, outputs.images, work)
        if reconstruction:
            report = _with_reconstruction(report, spec, judge, subject, work)
        if world.leads:
            _finish(report, subject, truth, judge, outputs)


def _check_options(features: str, batch_size: int, num: int | None) -> None:
    if features not in EXTRACTORS:
        raise PraError(f"--features {features!r} is unknown{nearest(features, EXTRACTORS)}")
    if batch_size < 1:
        raise PraError(f"--batch-size {batch_size} must be at least 1")
    if num is not None and num < 2:
        raise PraError(f"--num {num}: at least 2 images have a distribution")


def _judged(subject: Subject, truth: Reference, judge: FeatureExtractor, images: Path | None, work: Work) -> Report:
    """The report; ``images`` is where the images go, if anywhere."""
    share = work.world.share(subject.count)
    batches = subject.batches(share, work.batch_size)
    known = {"images": subject.provenance, "environment": environment(), "processes": work.world.size}
    if images is None:
        return evaluate(batches, truth, judge, subject.count, provenance=known, world=work.world)
    part = images if work.world.size == 1 else images.with_name(f".{images.name}.part{work.world.rank}")
    try:
        batches = exported(batches, len(share), part)
        report = evaluate(batches, truth, judge, subject.count, provenance=known, world=work.world)
        if part != images:
            work.world.combine(part, lambda parts: join_exports(parts, images))
    finally:
        if part != images:
            part.unlink(missing_ok=True)
    return report


def _finish(report: Report, subject: Subject, truth: Reference, judge: FeatureExtractor, outputs: Outputs) -> None:
    if outputs.report:
        report.save(outputs.report)
    print(report.table())
    count, target = subject.count, subject.target
    print(f"{count} images of {target} against {truth.name}, features {judge.name} {judge.fingerprint[:12]}")
    for what, path in dataclasses.asdict(outputs).items():
        if path:
            print(f"  {what}: {path}")


# --- what is judged -----------------------------------------------------------------------------------------


def _open(target: Path, num: int | None, work: Work, precision: Precision, settings: tuple[str, ...]) -> Subject:
    if is_address(target) or (target / pra.weights.CONFIG).exists():
        subject = _run(target, num or OF_A_RUN, work.device, precision, settings)
    else:
        subject = _finished(target, num, settings)
        if precision is not Precision.AUTO:
            raise PraError(f"--precision {precision.value} is for sampling; these images are finished: leave it out")
    if subject.count < work.world.size:
        raise PraError(f"{work.world.size} processes cannot share {subject.count} images; start fewer")
    return subject


def _finished(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    if target.is_file():
        return _batch_of(target, num, settings)
    if not target.is_dir():
        raise PraError(f"no run, folder of pictures or .npz at {target}")
    return _folder(target, num, settings)


def _run(target: Path, count: int, device: torch.device, precision: Precision, settings: tuple[str, ...]) -> Subject:
    folder = pra.weights.model_folder(target)
    model = pra.weights.load(folder, device=device)
    chosen = apply_settings(Adjustable(_data_of(folder), model.sampling), settings)
    classes = model.config.num_classes
    name = pra.weights.weights_name(folder)
    sampler, requests = Sampler(model, chosen.sampling, precision), Numbered(count, tuple(range(classes)))
    provenance = {
        "model": str(folder),
        "weights": name,
        "weights_sha256": file_sha256(folder / name),
        "sampling": how_sampled(sampler),
        "labels": f"index % {classes}",
        "seeds": f"0-{count - 1}",
        "count": count,
    }
    return Subject(
        target, count, model.config.image_size, model.config.channels, chosen,
        lambda share, size: sampled(sampler, requests, share, size), provenance, model,
    )  # fmt: skip


def _data_of(folder: Path) -> DataConfig:
    """The data that a checkpoint's run learnt from; without a source for a saved model."""
    run = pra.weights.run_of(folder)
    if run is None:
        return DataConfig(source="")
    path = run / pra.weights.CONFIG
    return from_dict(RunConfig, pra.weights.read_json(path), str(path)).data


def _folder(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    source = open_source(f"folder:{target}")
    chosen = spread(len(source), _count(target, len(source), num))
    size, channels = picture_shape(source.image(0))
    provenance = {"folder": str(target.absolute()), "count": len(chosen), "of": len(source)}
    return Subject(
        target, len(chosen), size, channels, apply_settings(_unknown(), settings),
        lambda share, batch_size: pictures(source, chosen, batch_size, share), provenance,
    )  # fmt: skip


def _batch_of(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    batch = NpzBatch(target)
    count = _count(target, batch.count, num)
    provenance = {"file": str(target.absolute()), "sha256": file_sha256(target), "count": count, "of": batch.count}
    if batch.plan is not None:
        provenance["made"] = batch.plan
    return Subject(
        target, count, batch.size, batch.channels, apply_settings(_unknown(), settings),
        lambda share, size: batch.batches(size, share), provenance,
    )  # fmt: skip


def _count(target: Path, there: int, num: int | None) -> int:
    if (num or 0) > there:
        raise PraError(f"{target} holds {there} images, fewer than --num {num}")
    return num or there


def _unknown() -> Adjustable:
    return Adjustable(DataConfig(source=""), SamplingConfig())


# --- what it is held against --------------------------------------------------------------------------------


def _reference_of(subject: Subject, reference: str | None) -> str:
    spec = reference or subject.settings.data.source
    if not spec:
        raise PraError(f"{subject.target} does not say which data it belongs to; give --reference SRC or STATS.npz")
    return spec


def _extractor(features: str, weights: Path | None, spec: str, subject: Subject, work: Work) -> FeatureExtractor:
    with work.world.first_alone():  # downloads, or fits; the others find it in the cache
        if features == "inception":
            return inception(weights, work.device)
        if features == "dinov2":
            return dinov2(weights, work.device)
        if weights is not None:
            return Classifier(weights, work.device)
        return _classifier(spec, subject, work)


def _classifier(spec: str, subject: Subject, work: Work) -> Classifier:
    if not spec.endswith(".npz"):
        source, data = open_source(spec), subject.settings.data
        return fit_classifier(source, subject.size, subject.channels, data, work.device, work.world.leads)
    recorded = recorded_features(Path(spec).expanduser())
    if recorded is None or recorded[0] != "classifier":
        raise PraError(
            f"{spec} is not of a classifier, nor a data source to fit one on; use --features inception, or give the "
            "data source"
        )
    return find_classifier(recorded[1], work.device)


def _reference(spec: str, judge: FeatureExtractor, subject: Subject, work: Work) -> Reference:
    if spec.endswith(".npz"):
        return from_file(Path(spec).expanduser(), judge, world=work.world)
    return from_source(
        open_source(spec), subject.size, subject.channels, subject.settings.data, judge,
        batch_size=work.batch_size, world=work.world,
    )  # fmt: skip


def _real_images(spec: str, subject: Subject) -> str:
    """Where originals come from: the reference, or the run's own data where the reference is statistics."""
    return subject.settings.data.source if spec.endswith(".npz") else spec


def _check_reconstruction(spec: str, subject: Subject) -> None:
    if subject.model is None:
        raise PraError("--reconstruction needs a run or a model; these are finished images: leave it out")
    check_codec(subject.model)
    if not _real_images(spec, subject):
        raise PraError("--reconstruction needs real images; give a data source as --reference")


def _with_reconstruction(report: Report, spec: str, judge: FeatureExtractor, subject: Subject, work: Work) -> Report:
    assert subject.model is not None
    source = open_source(_real_images(spec, subject))
    chosen = spread(len(source), min(subject.count, len(source)))
    batches = prepared(
        source, chosen, subject.size, subject.channels, subject.settings.data, work.batch_size,
        work.world.share(len(chosen)),
    )  # fmt: skip
    figures = reconstruct(subject.model, batches, judge, len(chosen), world=work.world)
    return Report(
        report.figures | {"reconstruction": figures},
        report.provenance | {"reconstruction": {"source": source.name, "count": len(chosen)}},
    )
