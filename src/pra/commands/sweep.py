"""The command ``pra sweep``: thin."""

from __future__ import annotations

import shlex
import signal
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from tyro.conf import Positional, UseAppendAction, arg

from pra.commands.eval import DEFAULT, JudgingOptions
from pra.commands.options import Folder, How, Integer
from pra.config import SamplingConfig
from pra.errors import NotFiniteError, PraError
from pra.evaluation.evaluate import Report, describe, warn_of_few
from pra.evaluation.judging import Judge, Subject, open_judge, open_truth
from pra.evaluation.sweep import COLUMNS, GUIDANCE, Point, Result, draw, find_best, hints, points, read_results, table
from pra.models.weights import model_folder, run_of, weights_name
from pra.sampling.batches import Batch
from pra.utils.distributed import join
from pra.utils.files import own_folder, write_atomically
from pra.utils.locks import locked
from pra.utils.pixels import contact_sheet
from pra.utils.signals import Interrupted, ended_by_sigterm

FEW_OF_MANY = 5_000
"""Images per point without --num: enough to choose by, not to publish."""

Over = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE,...", help_behavior_hint="")]


def sweep_command(
    run: Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="")] = None,
    *,
    over: Over = (),
    num: Integer = None,
    out: Folder = None,
    how: JudgingOptions = DEFAULT,
) -> None:
    """Find the sampling settings that suit a model: judge the same classes and seeds with each, and draw some of them.

    Every combination of the values of --over is judged as in `pra eval`. If it is stopped, the same command resumes.
    Several GPUs share the work: torchrun --nproc-per-node 8 -m pra -- sweep RUN ...

    Args:
        run: A run, saved model or hub:user/model; by default the model that comes with pra.
        over: A sampling setting and the values to try, such as guidance=1,1.5,2 or solver=heun,dpm, or the weights to
            sample, average=ema,power-0.05,raw; may be repeated. By default guidance=1,1.5,2,3,4.
        num: Images to judge at each combination; by default 5000.
        out: A folder for figures, curves and samples; by default sweep in the run's folder, or NAME-sweep.
    """
    with join() as world:
        home = run_of(model_folder(run))
        subject, work = how.opened(run, FEW_OF_MANY if num is None else num, world)
        sampler = subject.sampled("pra sweep")
        tried = points(sampler.config, over or GUIDANCE)
        for name in (line.partition("=")[0].removeprefix("sampling.") for line in how.settings):
            if name in tried[0].changes:
                problem = f"--set sampling.{name}: the sweep varies it. Give its values as --over {name}=..."
                raise PraError(problem, "conflict", name=name)
        for point in tried:  # refuse what cannot be sampled before any work
            subject.sampled_with(point.sampling)
            weights_name(Path(subject.provenance["model"]), point.average)
        folder = out.expanduser() if out else _default_folder(run, home)
        with locked(folder, "filled", "choose another --out") if world.is_first else nullcontext(), ended_by_sigterm():
            truth, subject = open_truth(how.reference, how.labels, subject, work)
            results = _results(tried, subject, open_judge(truth, how.features, how.weights, subject, work), folder)
            if world.is_first:
                _tell(results, folder, sampler.model.sampling, run, shared=home is None)


def _results(tried: Sequence[Point], subject: Subject, judge: Judge, folder: Path) -> list[Result]:
    """Judge every point as `pra eval` does; the reports that an earlier sweep has left are read."""
    world = judge.work.world
    averages = {name: subject.with_average(name) for name in dict.fromkeys(point.average for point in tried)}
    subjects = {point.name: averages[point.average].sampled_with(point.sampling) for point in tried}
    known = describe(judge.extractor, judge.reference, subject.count)
    expected = {name: known | {"images": one.provenance} for name, one in subjects.items()}
    found = world.run_on_first(lambda: read_results(folder, expected))
    for point in (point for point in tried if point.name not in found):
        try:
            strip: list[Tensor] = []
            report = judge.report(subjects[point.name], what=point.name, watch=partial(_kept, strip))
            if world.is_first:
                picture = contact_sheet(torch.stack(strip), COLUMNS)
                write_atomically(folder / f"{point.name}.png", picture.save, format="PNG")
                report.save(folder / f"{point.name}.json")
        except (KeyboardInterrupt, SystemExit) as stop:
            signum = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0) - 128
            what = f"stopped with {len(found)} of {len(tried)} combinations judged, in {folder}"
            raise Interrupted(signum, what) from None
        except NotFiniteError as error:
            if world.size > 1:  # the other processes continue with theirs
                raise
            warnings.warn(f"{point.name} has no figures: {error}", stacklevel=2)
            report = Report({}, {})
        found[point.name] = report
    return [Result(point, found[point.name]) for point in tried]


def _kept(strip: list[Tensor], batch: Batch) -> Batch:
    """Keep the first images of all, to be drawn."""
    strip += batch.images[: COLUMNS - len(strip)]
    return batch


def _default_folder(run: Path | None, home: Path | None) -> Path:
    """Return a folder in the run's own, as it was named; one beside a saved model."""
    if run is None or home is None:
        return Path(f"{run.name if run else 'pra'}-sweep")
    given = run.expanduser()
    return own_folder((given if given.absolute() == home.absolute() else home) / "sweep")


def _tell(results: Sequence[Result], folder: Path, own: SamplingConfig, run: Path | None, shared: bool) -> None:
    """Print the table, its best row and the next commands; then draw the pictures, which might fail.

    ``own`` are the model's default settings; ``shared`` is true for a folder that is ready to share.
    """
    print(table(results))
    best = find_best(results)
    if best is None:
        print("no FID is finite: nothing here can be called the best")
    else:
        count = best.report.provenance["count"]
        print(f"best by FID: {best.point.name}, chosen by {count} images of the same labels and seeds at each point")
        warn_of_few(count)
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
