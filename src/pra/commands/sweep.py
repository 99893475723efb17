"""The command ``pra sweep``: thin."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from pra.commands.eval import DEFAULT, JudgingOptions
from pra.commands.options import Folder, How, Integer
from pra.config import SamplingConfig
from pra.errors import PraError
from pra.evaluation.evaluate import warn_of_few
from pra.evaluation.judging import open_judge, open_truth
from pra.evaluation.sweep import GUIDANCE, Result, draw, find_best, hints, judged, points, table
from pra.models.weights import model_folder, run_of, weights_name
from pra.utils.distributed import join
from pra.utils.files import own_folder
from pra.utils.locks import locked
from pra.utils.signals import ended_by_sigterm

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
        folder = out.expanduser() if out else default_folder(run, home, "sweep")
        with locked(folder, "filled", "choose another --out") if world.is_first else nullcontext(), ended_by_sigterm():
            truth, subject = open_truth(how.reference, how.labels, subject, work)
            results = judged(tried, subject, open_judge(truth, how.features, how.weights, subject, work), folder)
            if world.is_first:
                _tell(results, folder, sampler.model.sampling, run, shared=home is None)


def default_folder(run: Path | None, home: Path | None, name: str) -> Path:
    """Return a folder in the run's own, as it was named; one beside a saved model."""
    if run is None or home is None:
        return Path(f"{run.name if run else 'pra'}-{name}")
    given = run.expanduser()
    return own_folder((given if given.absolute() == home.absolute() else home) / name)


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
