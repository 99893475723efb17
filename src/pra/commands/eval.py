"""The command ``pra eval``: thin."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import Average, File, Flag, Integer, Settings, Text
from pra.config import Precision
from pra.config.checks import member
from pra.data import Source
from pra.data.loader import reading
from pra.errors import PraError
from pra.evaluation.evaluate import Report, check_codec, evaluate, reconstruct, told_of_few
from pra.evaluation.features import EXTRACTORS, FeatureExtractor
from pra.evaluation.outputs import Outputs
from pra.evaluation.reference import Reference
from pra.evaluation.samples import prepared, spread
from pra.evaluation.subject import Subject, Work, open_subject
from pra.evaluation.truth import (
    LABELS,
    Truth,
    check_classes,
    check_options,
    extractor,
    measured,
    open_alone,
    open_truth,
)
from pra.models.weights import EMA
from pra.sampling.batches import exported, join_exports
from pra.utils.distributed import join
from pra.utils.provenance import environment


def evaluate_command(
    target: Annotated[Positional[Path | None], arg(metavar="[RUN|DIR|FILE.npz]", help_behavior_hint="")] = None,
    *,
    reference: Text = None,
    features: Annotated[str, arg(metavar="|".join(EXTRACTORS))] = "inception",
    num: Integer = None,
    labels: Annotated[str, arg(metavar="|".join(LABELS))] = "balanced",
    average: Average = EMA,
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
        average: Which weights of a run: ema, raw, or another of its averages, such as power-0.05.
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
        check_options(features, labels, batch_size, num)
        arithmetic = member(Precision, precision, "--precision")
        work = Work(world, world.device(device), batch_size)
        subject = open_subject(target and target.expanduser(), num, work, arithmetic, settings, average)
        truth, subject = open_truth(reference, labels, subject, work)
        originals = _originals(truth, subject, work) if reconstruction else None
        with outputs.staged(world) as staged:
            judge = extractor(features, weights, truth, subject, work)
            known = measured(truth, judge, subject, work)
            report = _judged(subject, known, judge, staged.images, work)
            if originals:
                report = _with_reconstruction(report, originals, judge, subject, work)
            if world.is_first:
                when = {"date": date, "seconds": round(time.monotonic() - begin, 1)}
                report = replace(report, provenance=report.provenance | when)
                _finish(report, subject, known, judge, outputs, staged)


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
    told_of_few(subject.count)
    if staged.report:
        report.save(staged.report)
    if staged.statistics:
        truth.save(staged.statistics)
    outputs.publish(staged)
    for what, path in outputs.named().items():
        print(f"  {what}: {path}")
    if not outputs.report:
        print("the figures are not kept: --out FILE.json writes them, and where they come from")


# --- reconstructions ----------------------------------------------------------------------------------------


def _originals(truth: Truth, subject: Subject, work: Work) -> Source:
    """The real images to reconstruct: the reference, or the run's own data where the reference is a file.

    Raises:
        PraError: no model, no codec, no such images, or labels that mean something else to the encoder.
    """
    if subject.sampler is None:
        raise PraError("--reconstruction needs a run or a model; these are finished images: leave it out")
    codec = check_codec(subject.sampler.model)
    own = subject.settings.data.source
    if truth.source is None and not own:
        raise PraError("--reconstruction needs real images; give a data source as --reference")
    source = truth.source or open_alone(own, work)
    if codec.encoder.sees_condition:
        check_classes(source, subject.sampler.model, "--reconstruction")
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
