"""The command ``pra bench pareto``: thin."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.bench.pareto import FOLDER, PARETO, PICTURE, Row, draw, rows, seconds, tiers, tried, values_of
from pra.commands.eval import DEFAULT, JudgingOptions
from pra.commands.options import Integer
from pra.commands.sweep import FEW_OF_MANY, Over, default_folder
from pra.errors import PraError
from pra.evaluation.compare import Row as Line
from pra.evaluation.compare import Section, rendered
from pra.evaluation.evaluate import warn_of_few
from pra.evaluation.judging import check_at_least, open_judge, open_truth
from pra.evaluation.report import cell
from pra.evaluation.sweep import judged
from pra.models.weights import model_folder, run_of
from pra.training.run import write_json
from pra.utils.distributed import join
from pra.utils.files import write_atomically
from pra.utils.locks import locked
from pra.utils.provenance import environment
from pra.utils.signals import ended_by_sigterm


def pareto_command(
    run: Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="")] = None,
    *,
    over: Over = (),
    num: Integer = None,
    side_by_side: int = 16,
    rounds: int = 5,
    how: JudgingOptions = DEFAULT,
) -> None:
    """Measure quality against time: FID and seconds per image of several settings, in one run.

    Tries solvers, numbers of steps, steps along the raster and the shortcut head if there is one, each with guidance
    and without. The times are measured in turn, and compared with the model's own settings. Writes pareto.json and
    pareto.png into the folder pareto of the run; `pra export`, `pra push` and `pra demo` offer the settings best,
    balanced (FID within 5 % of the best) and fast (within 25 %) from there. If it is stopped, the same command resumes.

    Args:
        run: A run, saved model or hub:user/model; by default the model that comes with pra.
        over: In place of these, a setting and the values to try, such as steps=1,2,3; may be repeated.
        num: Images to judge at each setting; by default 5000.
        side_by_side: Images of a batch whose time is measured.
        rounds: Times that each setting is timed.
    """
    check_at_least(1, side_by_side=side_by_side, rounds=rounds)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise PraError("pra bench pareto measures one device. Start it without torchrun", code="unsupported")
    with join() as world:
        subject, work = how.opened(run, FEW_OF_MANY if num is None else num, world)
        own = subject.sampled("pra bench pareto").model.sampling
        chosen = tried(subject, over)
        folder = default_folder(run, run_of(model_folder(run)), FOLDER)
        with locked(folder, "filled", "wait for the other command"), ended_by_sigterm():
            truth, subject = open_truth(how.reference, how.labels, subject, work)
            judge = open_judge(truth, how.features, how.weights, subject, work)
            results = judged(chosen, subject, judge, folder)
            made = rows(results, seconds(subject, chosen, side_by_side, rounds), own)
            known = {
                "weights_sha256": subject.provenance["weights_sha256"],
                "count": subject.count,
                "reference": judge.reference.name,
                "features": judge.extractor.name,
                "side_by_side": min(side_by_side, subject.count),
                "rounds": rounds,
            }
            write_json(folder / PARETO, known | values_of(made) | {"environment": environment()})
            if importlib.util.find_spec("matplotlib") is not None:
                picture = draw(made, f"{subject.target}, {subject.count} images")
                write_atomically(folder / PICTURE, picture.savefig, format="png", dpi=110)
    _tell(made, folder, run)
    warn_of_few(subject.count)


def _tell(made: list[Row], folder: Path, run: Path | None) -> None:
    lines = []
    for row in made:
        median, low, high = row.ratio
        time = f"{median:.3g}x ({low:.3g} to {high:.3g})"
        lines.append(
            Line(row.name, [cell(row.fid), f"{1000 * row.seconds_per_image:.4g}", time], (0,) if row.front else ())
        )
    title = "settings, the model's own first; * on the front"
    print(rendered(["FID", "ms per image", "of the first's time"], [Section(title, lines)]))
    by_name = {row.name: row for row in made}
    for tier, name in tiers(made).items():
        words = ["pra", "sample", *([] if run is None else [str(run)]), *by_name[name].options]
        print(f"{tier + ':':<10}", shlex.join(words))
    for path in (folder / PARETO, folder / PICTURE):
        if path.exists():
            print(f"  {path.stem}: {path}")
