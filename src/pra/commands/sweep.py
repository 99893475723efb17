"""The command ``pra sweep``: thin."""

from __future__ import annotations

import shlex
import signal
import warnings
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import Positional, UseAppendAction, arg

from pra.commands.options import File, Folder, Integer, Settings, Text
from pra.commands.sampling_options import How
from pra.config import Precision, SamplingConfig
from pra.config.checks import member
from pra.data.loader import reading
from pra.errors import NotFiniteError, PraError
from pra.evaluation.evaluate import Report, evaluate, told_of_few
from pra.evaluation.features import EXTRACTORS, FeatureExtractor
from pra.evaluation.reference import Reference
from pra.evaluation.subject import Subject, Work, open_subject
from pra.evaluation.sweep.pictures import COLUMNS, draw, write_strip
from pra.evaluation.sweep.points import GUIDANCE, Point, points
from pra.evaluation.sweep.results import Result, check_folder, file_of, find_best, hints, identity, read_result, table
from pra.evaluation.truth import LABELS, check_options, extractor, measured, open_truth
from pra.models.weights import CONFIG, model_folder, run_of, weights_name
from pra.sampling.batches import Batch
from pra.utils.distributed import join
from pra.utils.locks import locked
from pra.utils.progress import Progress
from pra.utils.provenance import environment
from pra.utils.signals import Interrupted, ended_by_sigterm

FEW_OF_MANY = 5_000
"""Images per point where --num does not say: enough to choose by, not to publish."""

Over = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE,...", help_behavior_hint="")]


def sweep_command(
    run: Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="")] = None,
    *,
    over: Over = (),
    num: Integer = None,
    reference: Text = None,
    features: Annotated[str, arg(metavar="|".join(EXTRACTORS))] = "inception",
    labels: Annotated[str, arg(metavar="|".join(LABELS))] = "balanced",
    weights: File = None,
    out: Folder = None,
    batch_size: int = 256,
    precision: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "auto",
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Find the sampling settings that suit a model: judge the same classes and seeds with each, and draw some of them.

    Every combination of the values of --over is judged as `pra eval` does. Stopped, the same command goes on.
    Several GPUs share the work: torchrun --nproc-per-node 8 -m pra -- sweep RUN ...

    Args:
        run: A run, saved model or hub:user/model; by default the model that comes with pra.
        over: A sampling setting and the values to try, such as guidance=1,1.5,2 or solver=heun,dpm, or the weights to
            sample, average=ema,power-0.05,raw; may be repeated. By default guidance=1,1.5,2,3,4.
        num: Images to judge at each combination; by default 5000.
        reference: As `pra eval` takes it; by default the data that the run learnt from.
        features: inception; dinov2; or classifier: a small network fitted on the reference, once.
        labels: Which classes are sampled: each as often, or as often as the reference has it.
        weights: The features' weights, where they are not to be downloaded or fitted.
        out: A folder for figures, curves and samples; by default sweep in the run's folder, or NAME-sweep.
        batch_size: Images at a time; no figure depends on it.
        precision: Of the matrix products: auto is bfloat16 on GPUs that have it, else float32.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: What is the same for all, such as sampling.steps=5 or data.fit=pad; may be repeated.
    """
    with join() as world:
        check_options(features, labels, batch_size, num)
        arithmetic = member(Precision, precision, "--precision")
        work = Work(world, world.device(device), batch_size)
        home = run_of(model_folder(run))  # finished images, which `pra eval` takes too, cannot be sampled otherwise
        subject = open_subject(run and run.expanduser(), num or FEW_OF_MANY, work, arithmetic, settings)
        if subject.sampler is None:
            raise PraError(f"{run} holds weights without their {CONFIG}; give a run, or what `pra export` made")
        own = subject.sampler.model.sampling
        tried = points(subject.sampler.config, over or GUIDANCE)
        _check_varied_once(tried[0], settings)
        for point in tried:  # what cannot be sampled is refused before any work
            subject.sampled_with(point.sampling)
            weights_name(Path(subject.provenance["model"]), point.average)
        folder = out.expanduser() if out else _default_folder(run, home)
        with locked(folder, "filled", "choose another --out") if world.is_first else nullcontext(), ended_by_sigterm():
            truth, subject = open_truth(reference, labels, subject, work)
            judge = extractor(features, weights, truth, subject, work)
            known = measured(truth, judge, subject, work)
            models = {name: subject.with_average(name) for name in dict.fromkeys(point.average for point in tried)}
            results = _Sweep(models, known, judge, work, folder).results(tried)
            if world.is_first:
                _tell(results, folder, own, run, shared=home is None)


@dataclass(frozen=True)
class _Sweep:
    """What is judged at every point, a subject per average, by what, and where it goes."""

    subjects: dict[str, Subject]
    truth: Reference
    judge: FeatureExtractor
    work: Work
    folder: Path

    def results(self, tried: Sequence[Point]) -> list[Result]:
        """Of all points; those that an earlier sweep has left are read."""
        world = self.work.world
        found = world.run_on_first(lambda: self._found(tried))
        missing = [point for point in tried if point.name not in found]
        total = len(missing) * len(world.share(self._count))
        hidden = not world.is_first or not missing
        with Progress(total=total, unit="image", disable=hidden) as bar:
            for point in missing:
                bar.set_description(point.name)
                try:
                    found[point.name] = self._judged(point, bar)
                except (KeyboardInterrupt, SystemExit) as stop:
                    signum = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
                    what = f"stopped with {len(found)} of {len(tried)} combinations judged, in {self.folder}"
                    raise Interrupted(signum, what) from None
                except NotFiniteError as error:
                    if world.size > 1:  # the others go on with theirs
                        raise
                    warnings.warn(f"{point.name} has no figures: {error}", stacklevel=2)
                    found[point.name] = Result(point, Report({}, {}))
        return [found[point.name] for point in tried]

    @property
    def _count(self) -> int:
        """Images at each point."""
        return next(iter(self.subjects.values())).count

    def _subject(self, point: Point) -> Subject:
        return self.subjects[point.average].sampled_with(point.sampling)

    def _found(self, tried: Sequence[Point]) -> dict[str, Result]:
        known = {"features": {"sha256": self.judge.fingerprint}, "reference": self.truth.describe()}
        check_folder(self.folder, known | {"images": next(iter(self.subjects.values())).provenance})
        read = {}
        for point in tried:
            images = self._subject(point).provenance
            read[point.name] = read_result(point, self.folder, identity(known | {"images": images}))
        return {name: result for name, result in read.items() if result is not None}

    def _judged(self, point: Point, bar: Progress) -> Result:
        work, subject = self.work, self._subject(point)
        known = {"images": subject.provenance, "environment": environment(), "processes": work.world.size}
        with reading(subject.batches(work.world.share(subject.count), work.batch_size)) as batches:
            report = evaluate(
                self._shown(batches, point, bar), self.truth, self.judge, subject.count, provenance=known,
                progress=False, world=work.world,
            )  # fmt: skip
        if work.world.is_first:
            report.save(file_of(point, self.folder))
        return Result(point, report)

    def _shown(self, batches: Generator[Batch], point: Point, bar: Progress) -> Generator[Batch]:
        """The batches themselves; the first pictures are kept to be looked at."""
        first: list[Tensor] = []
        for batch in batches:
            if self.work.world.is_first and len(first) < COLUMNS:
                first += batch.images[: COLUMNS - len(first)]
            yield batch
            bar.update(len(batch.images))
        if first:
            write_strip(torch.stack(first), point, self.folder)


def _default_folder(run: Path | None, home: Path | None) -> Path:
    """In the run's own folder, as it was named; beside one where there is no run."""
    if run is None or home is None:
        return Path(f"{run.name if run else 'pra'}-sweep")
    given = run.expanduser()
    return (given if given.absolute() == home.absolute() else home) / "sweep"


def _check_varied_once(point: Point, settings: Sequence[str]) -> None:
    for line in settings:
        name = line.partition("=")[0].removeprefix("sampling.")
        if name in point.changes:
            raise PraError(f"--set {line}: {name} is what is varied; give its values as --over {name}=...")


def _tell(results: Sequence[Result], folder: Path, own: SamplingConfig, run: Path | None, shared: bool) -> None:
    """The table, the best of it and how to go on; then the pictures, which might fail.

    ``own`` is how the model is sampled when nothing is said; ``shared`` where it is a folder to share already.
    """
    print(table(results))
    best = find_best(results)
    if best is None:
        print("no FID is finite: nothing here can be called the best")
    else:
        count = best.report.provenance["count"]
        print(f"best by FID: {best.point.name}, chosen by {count} images of the same labels and seeds at each point")
        told_of_few(count)
        for hint in hints(results, best):
            print(hint)
        point, named = best.point.beside(own), [] if run is None else [str(run)]
        if point.changes.keys() <= {field.name for field in fields(How)}:
            print("next:", shlex.join(["pra", "sample", *named, *point.options]))
        if not shared:
            print("to share it so:", shlex.join(["pra", "export", *named, "DIR", *point.settings]))
    print(f"  figures: {folder}/*.json")
    for path in draw(results, folder):
        print(f"  {path.stem}: {path}")
