"""The command ``pra eval``: thin."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from pra.config import Precision
from pra.config.checks import member
from pra.data import Source, open_source
from pra.data.images import CorruptImage
from pra.data.loader import reading
from pra.distributed import join
from pra.errors import PraError, nearest
from pra.eval.classifier import Classifier, find_classifier, fit_classifier
from pra.eval.dinov2 import dinov2
from pra.eval.evaluate import Report, check_codec, evaluate, reconstruct
from pra.eval.features import FeatureExtractor, inception
from pra.eval.outputs import Outputs
from pra.eval.reference import Reference, from_file, from_source, recorded_features
from pra.eval.samples import exported, join_exports, picture_shape, prepared, spread
from pra.eval.subject import Subject, Work, open_subject
from pra.models import Model
from pra.options import File, Flag, Integer, Settings, Text
from pra.provenance import environment

EXTRACTORS = ("classifier", "dinov2", "inception")
LABELS = ("balanced", "reference")
FEW = 2_000
"""Images below which a line says what that does to FID."""


@dataclass(frozen=True)
class Truth:
    """What the images are held against, as it was named; ``source`` is None where that is a file."""

    spec: str
    source: Source | None

    @property
    def file(self) -> Path:
        """The file of statistics or of images."""
        return Path(self.spec).expanduser()


def evaluate_command(
    target: Annotated[Positional[Path | None], arg(metavar="[RUN|DIR|FILE.npz]", help_behavior_hint="")] = None,
    *,
    reference: Text = None,
    features: Annotated[str, arg(metavar="|".join(EXTRACTORS))] = "inception",
    num: Integer = None,
    labels: Annotated[str, arg(metavar="|".join(LABELS))] = "balanced",
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
    Several GPUs share the work: torchrun --nproc-per-node 8 -m pra -- eval RUN ... Stopped, it leaves nothing and
    begins anew: make many images with pra sample --num, which goes on, and judge the FILE.npz.

    Args:
        target: A run, saved model or hub:user/model to sample from, a folder of pictures, or a batch in ADM's layout;
            by default the model that comes with pra.
        reference: A data source such as digits or folder:PATH, or a FILE.npz of statistics or images. By default the
            data that the run learnt from.
        features: inception; dinov2, whose fid is FD-DINOv2; or classifier: a small network fitted on the reference,
            once.
        num: Images to judge; by default 50000 of a run, and all that DIR or FILE.npz holds.
        labels: Which classes a run samples: each as often, or as often as the reference has it.
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
    outputs = Outputs(*(path and path.expanduser() for path in (out, export_npz, export_statistics)))
    begin, date = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    with join() as world:
        outputs.check()
        _check_options(features, labels, batch_size, num)
        arithmetic = member(Precision, precision, "--precision")
        work = Work(world, world.device(device), batch_size)
        subject = open_subject(target and target.expanduser(), num, work, arithmetic, settings)
        truth = _truth(reference, subject, work)
        if reference and truth.source and world.leads:
            _tell_of_colour(truth.source, subject.channels)
        subject = _labelled(subject, labels, truth)
        originals = _originals(truth, subject, work) if reconstruction else None
        with outputs.staged(world) as staged:
            judge = _extractor(features, weights, truth, subject, work)
            measured = _reference(truth, judge, subject, work)
            report = _judged(subject, measured, judge, staged.images, work)
            if originals:
                report = _with_reconstruction(report, originals, judge, subject, work)
            if world.leads:
                known = {"date": date, "seconds": round(time.monotonic() - begin, 1)}
                report = replace(report, provenance=report.provenance | known)
                _finish(report, subject, measured, judge, outputs, staged)


def _check_options(features: str, labels: str, batch_size: int, num: int | None) -> None:
    for option, value, known in (("--features", features, EXTRACTORS), ("--labels", labels, LABELS)):
        if value not in known:
            raise PraError(f"{option} {value!r} is unknown{nearest(value, known)}")
    if batch_size < 1:
        raise PraError(f"--batch-size {batch_size} must be at least 1")
    if num is not None and num < 2:
        raise PraError(f"--num {num}: at least 2 images have a distribution")


def _judged(subject: Subject, truth: Reference, judge: FeatureExtractor, images: Path | None, work: Work) -> Report:
    """The report; ``images`` is where the images go, if anywhere."""
    share = work.world.share(subject.count)
    known = {"images": subject.provenance, "environment": environment(), "processes": work.world.size}
    batches = subject.batches(share, work.batch_size)
    if images is None:
        with reading(batches):
            return evaluate(batches, truth, judge, subject.count, provenance=known, world=work.world)
    part = images if work.world.size == 1 else images.with_name(f"{images.name}.part{work.world.rank}")
    try:
        with reading(batches):
            written = exported(batches, len(share), part)
            report = evaluate(written, truth, judge, subject.count, provenance=known, world=work.world)
        if part != images:
            work.world.combine(part, lambda parts: join_exports(parts, images))
    finally:
        if part != images:
            part.unlink(missing_ok=True)
    return report


def _finish(
    report: Report, subject: Subject, truth: Reference, judge: FeatureExtractor, outputs: Outputs, staged: Outputs
) -> None:
    """Shows the figures first: what the disk does then cannot take them."""
    print(report.table())
    print(f"{subject.count} images of {subject.target} against {truth.name}, features {judge.name} ", end="")
    print(judge.fingerprint[:12])
    if subject.count < FEW:
        print(
            f"{subject.count} images are few: FID is the higher, the fewer there are (Chong and Forsyth, arXiv "
            "1911.07023); compare it with that of as many images only"
        )
    if staged.report:
        report.save(staged.report)
    if staged.statistics:
        truth.save(staged.statistics)
    outputs.publish(staged)
    for what, path in outputs.named().items():
        print(f"  {what}: {path}")
    if not outputs.report:
        print("the figures are not kept: --out FILE.json writes them, and where they come from")


# --- what it is held against --------------------------------------------------------------------------------


def _truth(reference: str | None, subject: Subject, work: Work) -> Truth:
    spec = reference or subject.settings.data.source
    if not spec:
        raise PraError(f"{subject.target} does not say which data it belongs to; give --reference SRC or STATS.npz")
    return Truth(spec, None if spec.endswith(".npz") else _open(spec, work))


def _tell_of_colour(source: Source, channels: int) -> None:
    """A line where the reference's images, going by the first, are grey and the judged ones not, or the reverse."""
    with contextlib.suppress(CorruptImage):  # which is told, or passed over, when its turn comes
        grey = picture_shape(source.image(0))[1] == 1
        if grey != (channels == 1):
            turned = f"is grey, and gets {channels} channels" if grey else "has colour, and turns grey"
            print(f"the reference {source.name} {turned}, like the images that are judged")


def _open(spec: str, work: Work) -> Source:
    with work.world.first_alone():  # some sources are indexed once
        return open_source(spec)


def _labelled(subject: Subject, labels: str, truth: Truth) -> Subject:
    """A model's images with the labels that were asked for.

    Raises:
        PraError: finished images, or a reference that does not tell how frequent the model's classes are.
    """
    source, option = truth.source, "--labels reference"
    if labels == "balanced":
        if subject.sampler and source:
            _warn_of_balance(source)
        return subject
    if subject.sampler is None:
        raise PraError(f"{option} is for sampling; these images are finished: leave it out")
    if source is None:
        raise PraError(f"{option}: {truth.spec} does not say how frequent its classes are; give a data source")
    _check_classes(source, subject.sampler.model, option)
    return subject.labelled_like(source)


def _warn_of_balance(source: Source) -> None:
    counts = np.bincount(source.labels, minlength=len(source.classes))
    largest = int(counts.argmax())
    if counts[largest] * len(source.classes) > 2 * len(source):
        warnings.warn(
            f"{counts[largest] / len(source):.0%} of {source.name} are {source.classes[largest]!r}, and every class "
            "is sampled equally often: FID sees another mixture; --labels reference samples classes as often as there",
            stacklevel=2,
        )


def _check_classes(source: Source, model: Model, option: str) -> None:
    """Refuses labels that mean something else to the model."""
    there, own = source.classes, model.classes
    if there == own:
        return
    differing = [place for place, names in enumerate(zip(there, own, strict=False)) if names[0] != names[1]]
    if len(there) != len(own):
        how = f"{source.name} has {len(there)} classes, the model {len(own)}"
    else:
        how = f"class {differing[0]} is {there[differing[0]]!r} in {source.name}, {own[differing[0]]!r} in the model"
    raise PraError(f"{option} needs the labels of the model's own classes: {how}; give such a --reference")


def _extractor(features: str, weights: Path | None, truth: Truth, subject: Subject, work: Work) -> FeatureExtractor:
    with work.world.first_alone():  # downloads, or fits; the others find it in the cache
        if features == "inception":
            return inception(weights, work.device)
        if features == "dinov2":
            return dinov2(weights, work.device)
        if weights is not None:
            return Classifier(weights, work.device)
        return _classifier(truth, subject, work)


def _classifier(truth: Truth, subject: Subject, work: Work) -> Classifier:
    if truth.source is not None:
        data = subject.settings.data
        return fit_classifier(truth.source, subject.size, subject.channels, data, work.device, work.world.leads)
    recorded = recorded_features(truth.file)
    if recorded is None or recorded[0] != "classifier":
        raise PraError(
            f"{truth.spec} is not of a classifier, nor a data source to fit one on; use --features inception, or give "
            "the data source"
        )
    return find_classifier(recorded[1], work.device)


def _reference(truth: Truth, judge: FeatureExtractor, subject: Subject, work: Work) -> Reference:
    if truth.source is None:
        return from_file(truth.file, judge, world=work.world)
    return from_source(
        truth.source, subject.size, subject.channels, subject.settings.data, judge,
        batch_size=work.batch_size, world=work.world,
    )  # fmt: skip


# --- reconstructions ----------------------------------------------------------------------------------------


def _originals(truth: Truth, subject: Subject, work: Work) -> Source:
    """The real images to reconstruct: the reference, or the run's own data where the reference is a file.

    Raises:
        PraError: no model, no codec, no such images, or labels that mean something else to the encoder.
    """
    if subject.sampler is None:
        raise PraError("--reconstruction needs a run or a model; these are finished images: leave it out")
    model = check_codec(subject.sampler.model)
    own = subject.settings.data.source
    if truth.source is None and not own:
        raise PraError("--reconstruction needs real images; give a data source as --reference")
    source = truth.source or _open(own, work)
    codec = model.config.codec
    assert codec is not None, "checked"
    if codec.encoder.sees_condition:
        _check_classes(source, model, "--reconstruction")
    return source


def _with_reconstruction(
    report: Report, originals: Source, judge: FeatureExtractor, subject: Subject, work: Work
) -> Report:
    assert subject.sampler is not None
    chosen = spread(len(originals), min(subject.count, len(originals)))
    real = prepared(
        originals, chosen, subject.size, subject.channels, subject.settings.data, work.batch_size,
        work.world.share(len(chosen)),
    )  # fmt: skip
    with reading(real):
        figures = reconstruct(subject.sampler.model, real, judge, len(chosen), world=work.world)
    return Report(
        report.figures | {"reconstruction": figures},
        report.provenance | {"reconstruction": {"source": originals.name, "count": len(chosen)}},
    )
