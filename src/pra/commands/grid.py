"""The command ``pra grid``."""

from __future__ import annotations

import shlex
from pathlib import Path

from pra.commands.options import DEFAULT, How, Model, Number, SamplingOptions
from pra.errors import PraError
from pra.models import weights
from pra.sampling import Sampler
from pra.sampling.learnt_grid import ROUNDS, learn_grid, learn_steps
from pra.utils.device import pick_device
from pra.utils.progress import Progress

ERROR = "root mean square error of a state's numbers (their own mean square is 1) against many small steps"


def grid_command(run: Model = None, *, budget: Number = None, images: int = 32, how: SamplingOptions = DEFAULT) -> None:
    """Learn where a solver's few intervals should lie for a model: the times that agree best with many small steps.

    With --budget, learn how many steps each stretch of the raster should take instead. Prints the error of each grid or
    schedule, and the command to sample with.

    Args:
        budget: Evaluations of the head a patch, on average over the raster, such as 2.5; guidance does not count.
        images: Number of sampled images to learn from.
        how: The solver, its steps and the guidance to learn for.
    """
    if images < 1:
        raise PraError(f"--images {images} must be at least 1", option="--images", value=images)
    sampler = how.sampler(weights.model_folder(run, how.average), pick_device(how.device))
    if budget is not None:
        _tell_steps(sampler, budget, images, run, how)
        return
    with Progress(total=2 * ROUNDS, unit="round", desc="learning", leave=False) as bar:
        found = learn_grid(sampler.model, sampler.config, images, progress=bar.update)
    config = sampler.config
    print(f"{config.solver.value}, {config.steps} steps, guidance {config.guidance:g}")
    print(f"{ERROR}, by grid:")
    for name, error in sorted(found.errors.items(), key=lambda pair: pair[1]):
        print(f"  {name:14} {error:.4f}")
    times = ",".join(f"{t:.6g}" for t in found.times)
    words = how.words("steps", "raster_steps", "time_grid", "shift", "times")
    print(shlex.join(["pra", "sample", *([str(run)] if run else []), *words, "--times", times]))


def _tell_steps(sampler: Sampler, budget: float, images: int, run: Path | None, how: How) -> None:
    config = sampler.config
    found = learn_steps(sampler.model, config, budget, images)
    print(f"{config.solver.value}, at most {budget:g} evaluations a patch, guidance {config.guidance:g}")
    print(f"{ERROR}, by schedule:")
    for name, (evaluations, error) in found.errors.items():
        print(f"  {name:14} {evaluations:6.2f} evaluations  {error:.4f}")
    counts = ",".join(map(str, found.raster_steps))
    words = how.words("steps", "raster_steps", "times")
    print(shlex.join(["pra", "sample", *([str(run)] if run else []), *words, "--raster-steps", counts]))
