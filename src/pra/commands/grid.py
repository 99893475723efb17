"""The command ``pra grid``."""

from __future__ import annotations

import shlex

from pra.commands.options import DEFAULT, Model, SamplingOptions
from pra.errors import PraError
from pra.models import weights
from pra.sampling.learnt_grid import ROUNDS, learn_grid
from pra.utils.device import pick_device
from pra.utils.progress import Progress


def grid_command(run: Model = None, *, images: int = 32, how: SamplingOptions = DEFAULT) -> None:
    """Learn where a solver's few intervals should lie for a model: the times that agree best with many small steps.

    Prints the error of each grid, and the command to sample with.

    Args:
        images: Number of sampled images to learn from.
        how: The solver, its steps and the guidance to learn for.
    """
    if images < 1:
        raise PraError(f"--images {images} must be at least 1", option="--images", value=images)
    sampler = how.sampler(weights.model_folder(run, how.average), pick_device(how.device))
    with Progress(total=2 * ROUNDS, unit="round", desc="learning", leave=False) as bar:
        found = learn_grid(sampler.model, sampler.config, images, progress=bar.update)
    config = sampler.config
    print(f"{config.solver.value}, {config.steps} steps, guidance {config.guidance:g}")
    print("root mean square error of a state's numbers (their own mean square is 1) against many small steps, by grid:")
    for name, error in sorted(found.errors.items(), key=lambda pair: pair[1]):
        print(f"  {name:14} {error:.4f}")
    times = ",".join(f"{t:.6g}" for t in found.times)
    words = ["pra", "sample", *([str(run)] if run else []), *how.words("steps", "time_grid", "shift", "times")]
    print(shlex.join([*words, "--times", times]))
