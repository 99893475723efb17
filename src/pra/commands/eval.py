"""The command ``pra eval``: thin."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import Average, File, Flag, Integer, Settings, Text
from pra.config import Precision
from pra.config.checks import member
from pra.evaluation.evaluate import Report, warn_of_few
from pra.evaluation.features import EXTRACTORS
from pra.evaluation.judging import (
    LABELS,
    Judge,
    Subject,
    Work,
    check_options,
    open_judge,
    open_originals,
    open_subject,
    open_truth,
)
from pra.evaluation.outputs import Outputs
from pra.models.weights import EMA
from pra.utils.distributed import join


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

    Two protocols are shown side by side, ADM's and torch-fidelity's. Several GPUs share the work: torchrun
    --nproc-per-node 8 -m pra -- eval RUN ... Stopped, it leaves nothing and begins anew.

    Args:
        target: A run, saved model or hub:user/model, a folder of pictures, or a batch in ADM's layout; by default the
            model that comes with pra.
        reference: A data source such as folder:PATH, or a FILE.npz of statistics or images; by default the run's data.
        features: inception; dinov2, whose fid is FD-DINOv2; or classifier, a small network fitted on the reference.
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
        settings: How references are prepared and a run samples: data.fit=pad, sampling.guidance=2; may be repeated.
    """
    begin = datetime.now(UTC)
    out, export_npz, export_statistics = (path and path.expanduser() for path in (out, export_npz, export_statistics))
    with join() as world:
        outputs = Outputs(out, export_npz, export_statistics)
        outputs.check()
        check_options(features, labels, batch_size, num)
        work = Work(world, world.device(device), batch_size)
        subject = open_subject(target, num, work, member(Precision, precision, "--precision"), settings, average)
        truth, subject = open_truth(reference, labels, subject, work)
        originals = open_originals(truth, subject, work) if reconstruction else None
        with outputs.staged(world) as staged:
            judge = open_judge(truth, features, weights, subject, work)
            report = judge.report(subject, staged.images)
            if originals:
                report = judge.with_reconstruction(report, subject, originals)
            if world.is_first:
                _finish(report, begin, subject, judge, outputs, staged)


def _finish(report: Report, begin: datetime, subject: Subject, judge: Judge, outputs: Outputs, staged: Outputs) -> None:
    """Print the figures before they are written: a full disk cannot take them."""
    seconds = round((datetime.now(UTC) - begin).total_seconds(), 1)
    when = {"date": begin.isoformat(timespec="seconds"), "seconds": seconds}
    report = replace(report, provenance=report.provenance | when)
    print(report.table())
    features = f"{judge.extractor.name} {judge.extractor.fingerprint[:12]}"
    print(f"{subject.count} images of {subject.target} against {judge.reference.name}, features {features}")
    warn_of_few(subject.count)
    if staged.report:
        report.save(staged.report)
    if staged.statistics:
        judge.reference.save(staged.statistics)
    outputs.publish(staged)
    for what, path in outputs.named().items():
        print(f"  {what}: {path}")
    if not outputs.report:
        print("the figures are not kept: --out FILE.json writes them, and where they come from")
