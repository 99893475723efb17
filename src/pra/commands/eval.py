"""The command ``pra eval``: thin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import Average, Device, File, Flag, Integer, Settings, Text, choices, read_captions
from pra.config import Precision
from pra.config.checks import member
from pra.errors import PraError, counted
from pra.evaluation import judging
from pra.evaluation.alignment import CLIP, FITTED, align, asked_by_lines, asked_by_source, open_aligner
from pra.evaluation.evaluate import Report, warn_of_few
from pra.evaluation.features import EXTRACTORS
from pra.evaluation.judging import LABELS, Judge, Subject, Work
from pra.evaluation.outputs import check_outputs, publish, staged
from pra.models.weights import EMA
from pra.utils.distributed import World, join


@dataclass(frozen=True)
class Judging:
    """Options of the commands that judge images."""

    reference: Text = None
    """A data source such as folder:PATH, or a FILE.npz of statistics or images; by default the run's data."""
    features: Annotated[str, arg(metavar="|".join(EXTRACTORS))] = "inception"
    """inception; dinov2, whose fid is FD-DINOv2; or classifier, a small network fitted on the reference, once."""
    labels: Annotated[str, arg(metavar="|".join(LABELS))] = "balanced"
    """Classes that a run samples: all equally often, or as often as in the reference. A run that reads captions
    gets those of the reference."""
    weights: File = None
    """A file with the features' weights, in place of downloading or fitting them."""
    batch_size: int = 256
    """Images at a time; no figure depends on it."""
    precision: Annotated[str, choices(Precision, "(default: auto)")] = "auto"
    """Precision of a run's matrix products in sampling: auto is bfloat16 on GPUs that have it, else float32."""
    device: Device = None
    settings: Settings = ()
    """Setting of how references are prepared or a run samples: data.fit=pad, sampling.guidance=2; may be repeated."""

    def opened(self, target: Path | None, num: int | None, world: World, average: str = EMA) -> tuple[Subject, Work]:
        """Open the images to judge; refuse options that do not apply to them."""
        judging.check_options(self.features, self.labels, self.batch_size, num)
        work = Work(world, world.device(self.device), self.batch_size)
        precision = member(Precision, self.precision, "--precision")
        return judging.open_subject(target, num, work, precision, self.settings, average), work


JudgingOptions = Annotated[Judging, arg(name="")]
DEFAULT = Judging()
Alignment = Annotated[tuple[str, ...] | None, arg(metavar=f"[{CLIP}]", help_behavior_hint="")]


def evaluate_command(
    target: Annotated[Positional[Path | None], arg(metavar="[RUN|DIR|FILE.npz]", help_behavior_hint="")] = None,
    *,
    num: Integer = None,
    average: Average = EMA,
    reconstruction: Flag = False,
    patch_size: Integer = None,
    export_npz: File = None,
    export_statistics: File = None,
    alignment: Alignment = None,
    captions: File = None,
    out: File = None,
    how: JudgingOptions = DEFAULT,
) -> None:
    """Judge generated images: FID, sFID, Inception Score, KID, precision and recall.

    Two protocols are shown side by side, ADM's and torch-fidelity's. Several GPUs share the work: torchrun
    --nproc-per-node 8 -m pra -- eval RUN ... If it is stopped, it leaves nothing and starts again.

    Args:
        target: A run, saved model or hub:user/model, a folder of pictures, or a batch in ADM's layout; by default the
            model that comes with pra.
        num: Images to judge; by default 50000 of a run, and all that DIR or FILE.npz holds.
        reconstruction: Also judge the codec's reconstructions of as many real images.
        patch_size: Side of the patches whose borders are searched for seams; by default the model's.
        export_npz: Also write the images as the batch that ADM's evaluator reads.
        export_statistics: Also write the reference's statistics, to be given as --reference next time.
        alignment: Judge how well images show their captions instead. The captions are those of --reference or
            --captions, the judge is a network fitted on the run's data once, or CLIP with --alignment clip; --weights
            names its file.
        captions: With --alignment, a text file (UTF-8) of captions to draw, one a line.
        out: Write figures and provenance as JSON.
    """
    begin = datetime.now(UTC)
    judging.check_at_least(2, patch_size=patch_size)
    given = {"--reconstruction": reconstruction, "--patch-size": patch_size, "--export-npz": export_npz}
    _check_alignment(alignment, captions, how, given | {"--export-statistics": export_statistics})
    asked = {"report": out, "images": export_npz, "statistics": export_statistics}
    files = {name: path.expanduser() for name, path in asked.items() if path}
    with join() as world:
        check_outputs(**files)
        subject, work = how.opened(target, num, world, average)
        if alignment is not None:
            _align(alignment, captions, num, how, subject, work, begin, files)
            return
        truth, subject = judging.open_truth(how.reference, how.labels, subject, work)
        subject = replace(subject, patch_size=patch_size or subject.patch_size)
        originals = judging.open_originals(truth, subject, work) if reconstruction else None
        with staged(files, world) as places:
            judge = judging.open_judge(truth, how.features, how.weights, subject, work)
            report = judge.report(subject, places.get("images"))
            if originals:
                report = judge.with_reconstruction(report, subject, originals)
            if world.is_first:
                features = f"{judge.extractor.name} {judge.extractor.fingerprint[:12]}"
                line = f"against {judge.reference.name}, features {features}"
                _finish(report, begin, subject, line, places, files, judge)


def _check_alignment(
    alignment: tuple[str, ...] | None, captions: Path | None, how: Judging, others: Mapping[str, object]
) -> None:
    """Refuse options that --alignment does not take; ``others`` are the given options of other figures."""
    if alignment is None and captions is None:
        return
    if alignment is None:
        raise PraError("--captions needs --alignment. Give both", "conflict", option="--captions")
    if len(alignment) > 1 or (alignment and alignment[0] != CLIP):
        problem = f"--alignment {' '.join(alignment)} is unknown. Write RUN first, and --alignment or --alignment clip"
        raise PraError(problem, "unknown", value=" ".join(alignment))
    own = {"--captions": captions and how.reference, "--features": how.features != DEFAULT.features}
    given = {**others, **own, "--labels": how.labels != DEFAULT.labels}
    for option in (option for option, value in given.items() if value):
        other = "--reference" if option == "--captions" else "--alignment"
        raise PraError(f"{option} and {other} exclude each other. Leave one out", "conflict", option=option)


def _align(
    alignment: tuple[str, ...],
    captions: Path | None,
    num: int | None,
    how: Judging,
    subject: Subject,
    work: Work,
    begin: datetime,
    files: dict[str, Path],
) -> None:
    """Judge how well a run's images show their captions."""
    if captions is None:
        source = work.open_source(judging.reference_of(how.reference, subject))
        subject = asked_by_source(subject, source, num)
    else:
        source, subject = None, asked_by_lines(subject, read_captions((), captions) or [], num)
    with staged(files, work.world) as places:
        aligner = open_aligner(alignment[0] if alignment else FITTED, how.weights, subject, work)
        report = align(subject, source, aligner, work)
        if work.world.is_first:
            asked = f"captions of {source.name if source else captions}"
            line = f"asked for {asked}, features {aligner.name} {aligner.fingerprint[:12]}"
            _finish(report, begin, subject, line, places, files)


def _finish(
    report: Report,
    begin: datetime,
    subject: Subject,
    line: str,
    places: dict[str, Path],
    files: dict[str, Path],
    judge: Judge | None = None,
) -> None:
    """Write the files and print the figures, each even if the other fails: the disk is full, or stdout is closed.

    ``line`` ends the line below the figures. With a ``judge``, the figures are of distributions.
    """
    seconds = round((datetime.now(UTC) - begin).total_seconds(), 1)
    when = {"date": begin.isoformat(timespec="seconds"), "seconds": seconds}
    report = replace(report, provenance=report.provenance | when)
    try:
        if "report" in places:
            report.save(places["report"])
        if judge and "statistics" in places:
            judge.reference.save(places["statistics"])
        publish(places, files)
    finally:
        print(report.table())
        print(f"{counted(subject.count, 'image')} of {subject.target} {line}")
        if judge:
            warn_of_few(subject.count)
    for what, path in files.items():
        print(f"  {what}: {path}")
    if "report" not in files:
        print("the figures are not saved. Use --out FILE.json to keep them with their provenance")
