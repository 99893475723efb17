"""The command ``pra eval``: thin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import Average, Device, File, Flag, Integer, Settings, Text, choices
from pra.config import Precision
from pra.config.checks import member
from pra.evaluation import judging
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
    """Which classes a run samples: each as often, or as often as the reference has it. A run that reads captions
    is given those of the reference."""
    weights: File = None
    """The features' weights, where they are not to be downloaded or fitted."""
    batch_size: int = 256
    """Images at a time; no figure depends on it."""
    precision: Annotated[str, choices(Precision, "(default: auto)")] = "auto"
    """Of a run's matrix products while it samples: auto is bfloat16 on GPUs that have it, else float32."""
    device: Device = None
    settings: Settings = ()
    """How references are prepared and a run samples: data.fit=pad, sampling.guidance=2; may be repeated."""

    def opened(self, target: Path | None, num: int | None, world: World, average: str = EMA) -> tuple[Subject, Work]:
        """Open what is judged; refuse options that do not go with it."""
        judging.check_options(self.features, self.labels, self.batch_size, num)
        work = Work(world, world.device(self.device), self.batch_size)
        precision = member(Precision, self.precision, "--precision")
        return judging.open_subject(target, num, work, precision, self.settings, average), work


JudgingOptions = Annotated[Judging, arg(name="")]
DEFAULT = Judging()


def evaluate_command(
    target: Annotated[Positional[Path | None], arg(metavar="[RUN|DIR|FILE.npz]", help_behavior_hint="")] = None,
    *,
    num: Integer = None,
    average: Average = EMA,
    reconstruction: Flag = False,
    patch_size: Integer = None,
    export_npz: File = None,
    export_statistics: File = None,
    out: File = None,
    how: JudgingOptions = DEFAULT,
) -> None:
    """Judge generated images: FID, sFID, Inception Score, KID, precision and recall.

    Two protocols are shown side by side, ADM's and torch-fidelity's. Several GPUs share the work: torchrun
    --nproc-per-node 8 -m pra -- eval RUN ... Stopped, it leaves nothing and begins anew.

    Args:
        target: A run, saved model or hub:user/model, a folder of pictures, or a batch in ADM's layout; by default the
            model that comes with pra.
        num: Images to judge; by default 50000 of a run, and all that DIR or FILE.npz holds.
        reconstruction: Also judge the codec's reconstructions of as many real images.
        patch_size: At the borders of which patches to look for seams; by default the model's.
        export_npz: Also write the images as the batch that ADM's evaluator reads.
        export_statistics: Also write the reference's statistics, to be given as --reference next time.
        out: Write figures and provenance as JSON.
    """
    begin = datetime.now(UTC)
    judging.check_at_least(2, patch_size=patch_size)
    asked = {"report": out, "images": export_npz, "statistics": export_statistics}
    files = {name: path.expanduser() for name, path in asked.items() if path}
    with join() as world:
        check_outputs(**files)
        subject, work = how.opened(target, num, world, average)
        truth, subject = judging.open_truth(how.reference, how.labels, subject, work)
        subject = replace(subject, patch_size=patch_size or subject.patch_size)
        originals = judging.open_originals(truth, subject, work) if reconstruction else None
        with staged(files, world) as places:
            judge = judging.open_judge(truth, how.features, how.weights, subject, work)
            report = judge.report(subject, places.get("images"))
            if originals:
                report = judge.with_reconstruction(report, subject, originals)
            if world.is_first:
                _finish(report, begin, subject, judge, places, files)
                for what, path in files.items():
                    print(f"  {what}: {path}")
                if not out:
                    print("the figures are not kept: --out FILE.json writes them, and where they come from")


def _finish(
    report: Report, begin: datetime, subject: Subject, judge: Judge, places: dict[str, Path], files: dict[str, Path]
) -> None:
    """Write the files and print the figures, each even if the other fails: the disk is full, or stdout is closed."""
    seconds = round((datetime.now(UTC) - begin).total_seconds(), 1)
    when = {"date": begin.isoformat(timespec="seconds"), "seconds": seconds}
    report = replace(report, provenance=report.provenance | when)
    try:
        if "report" in places:
            report.save(places["report"])
        if "statistics" in places:
            judge.reference.save(places["statistics"])
        publish(places, files)
    finally:
        print(report.table())
        features = f"{judge.extractor.name} {judge.extractor.fingerprint[:12]}"
        print(f"{subject.count} images of {subject.target} against {judge.reference.name}, features {features}")
        warn_of_few(subject.count)
