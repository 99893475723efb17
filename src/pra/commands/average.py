"""The command ``pra average``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.training.posthoc import posthoc


def average_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    length: float,
) -> None:
    """Make the power-function average of another length, from the averages in a run's checkpoints.

    The run must have been trained with train.averages, best with two lengths and train.keep_every. The new average lies
    in the newest checkpoint beside the others, and every command takes it by its name as --average.

    Args:
        run: A run's folder, or one of its checkpoints.
        length: Relative to the training: 0.08 averages over about the last 8 % of the steps.
    """
    file, count, error = posthoc(run, length)
    print(f"{file.stem}: from {count} stored averages, error of the profile {error:.2%}: {file}")
    print("next:", shlex.join(["pra", "sample", str(run), "--average", file.stem]))
