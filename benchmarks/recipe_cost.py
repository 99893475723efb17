"""The cost of the recipe: a training step of each rung of the study `recipe` over faithful PRA's, timed in turn.

    python benchmarks/recipe_cost.py --settings emoji-64 fashion-64 emoji-16 --out studies/recipe/cost.json

Prints the median of the paired ratios with their range. The study trains its kept rungs once more for faithful PRA's
seconds, by these ratios.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from pra.bench.device import timed
from pra.bench.training import WARM_UPS, SyntheticStep, summary
from pra.config import RunConfig
from pra.utils.device import pick_device
from pra.utils.files import write_atomically
from pra.utils.provenance import environment
from studies.ladder import FAITHFUL, LADDER, PLUS, climb
from studies.settings import SCALES, base, find_setting


def main(
    settings: tuple[str, ...] = ("emoji-64",),
    scale: str = "cpu",
    rounds: int = 60,
    compile: bool = True,
    device: str | None = None,
    out: Path | None = None,
) -> None:
    """Measure and print.

    Args:
        settings: Settings of the studies.
        scale: Scale of the models, cpu or gpu.
        rounds: Timed steps of each rung, after two warm-ups.
        compile: Compile the step, as the studies do.
        device: cpu or cuda.
        out: JSON file to write.
    """
    target = pick_device(device)
    torch._dynamo.config.recompile_limit = 64  # every rung of every setting is a graph of its own
    found = {}
    for name in settings:
        rungs = dict(climb(base(find_setting(name), SCALES[scale])))
        kept = [FAITHFUL, *(rung.name for rung in LADDER if rung.kept), PLUS]
        found[name] = costs({rung: rungs[rung] for rung in kept}, rounds, compile, target)
        for rung, ratio in found[name].items():
            print(f"{name:12} {rung:24} {ratio['median']:.2f}x  ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    result = {"settings": found, "scale": scale, "rounds": rounds, "compile": compile, "where": environment()}
    if out is not None:
        write_atomically(out, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))


def costs(rungs: dict[str, RunConfig], rounds: int, compile: bool, device: torch.device) -> dict[str, dict[str, float]]:
    """Time a step of each rung in turn; return its seconds over the first rung's, the median and the range."""
    steps = [SyntheticStep(replace(run, train=replace(run.train, compile=compile)), device) for run in rungs.values()]
    series = [[timed(step, device) for step in steps] for _ in range(WARM_UPS + rounds)][WARM_UPS:]
    ratios = {name: [times[place] / times[0] for times in series] for place, name in enumerate(rungs)}
    return {name: summary(values) for name, values in list(ratios.items())[1:]}


if __name__ == "__main__":
    tyro.cli(main)
