"""The command ``python -m studies``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from pra.commands.options import Device, Flag, Integer, Text, parse_numbers
from pra.commands.program import parse_command, run_program
from pra.errors import PraError
from pra.utils.device import cores, pick_device
from studies.catalogue import STUDIES, find_study, only
from studies.run import Workplace
from studies.settings import find_scale, find_setting
from studies.study import run_study

PROGRAM = "python -m studies"
SIDE_BY_SIDE = 4
"""Small models that one GPU trains at once."""


def study_command(
    name: Annotated[Positional[str], arg(metavar="[NAME]", help_behavior_hint="")] = "",
    *,
    setting: Text = None,
    systems: Text = None,
    values: Text = None,
    scale: Annotated[str, arg(metavar="cpu|cpu-wide|gpu|gpu-short|smoke")] = "cpu",
    seeds: Text = None,
    jobs: Integer = None,
    out: Path = Path("studies"),
    runs: Path = Path("runs/studies"),
    compile: Flag = False,
    device: Device = None,
) -> None:
    """Run a study: the paper's systems side by side, into a CSV, a table and plots. Without a name, list the studies.

    Results in OUT/*/results.csv are not made again. If the study is stopped, the same command resumes.

    Args:
        name: A study.
        setting: Data and tokens, such as fashion-64,emoji-16; by default the study's own, at scale cpu its first.
        systems: Systems to run, such as pra,states; by default all of the study.
        values: Values to run of the setting that the study varies, separated by |, such as "faithful|plus".
        scale: cpu ends within an hour on 2 cores with --compile; cpu-wide doubles the width; gpu is larger; gpu-short
            runs gpu's models for minutes; smoke trains for a few steps.
        seeds: One run of each system per seed, such as 0-2; by default 0 at scale cpu, 0-2 at gpu.
        jobs: Runs side by side; by default one per core, or 4 on a GPU.
        out: The folder of results; a study writes to OUT/NAME.
        runs: The folder of runs, which studies share.
        compile: Have torch compile the training step; on CPUs it needs a C++ compiler.
    """
    if not name:
        for study in STUDIES.values():
            print(f"{study.name:16} {study.question} ({', '.join(study.settings)})")
        return
    study, size = find_study(name), find_scale(scale)
    settings = [find_setting(part.strip()) for part in (setting.split(",") if setting else study.asked_in(size))]
    for column, asked, separator in (("system", systems, ","), ("value", values, "|")):
        if asked:
            study = only(study, column, [part.strip() for part in asked.split(separator)], settings[0], size)
    numbers = list(dict.fromkeys(parse_numbers(seeds, "--seeds"))) if seeds else list(range(size.seeds))
    target = pick_device(device)
    side_by_side = _default_jobs(target) if jobs is None else jobs
    if side_by_side < 1:
        raise PraError(f"--jobs {jobs} must be at least 1")
    place = Workplace(runs.expanduser(), target, side_by_side, compile)
    names = ",".join(one.name for one in settings)
    print(f"study: {name} on {names}, scale {scale}, {side_by_side} side by side, {target}")
    files, missing = run_study(study, settings, size, numbers, out.expanduser(), place)
    readme = out.expanduser() / name / "README.md"
    print("\n".join(line for line in readme.read_text().splitlines() if line.startswith(("|", "##"))))
    if not missing:
        print(f"nothing to do: all results are in {files[0]}. Use another --out to measure again")
    for path in files:
        print(f"  {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m studies`` and return its exit code, as :func:`pra.cli.main` does."""
    return run_program(PROGRAM, _parse, argv)


def _parse(args: list[str]) -> Callable[[], object]:
    """Return what runs the command line."""
    return parse_command(PROGRAM, study_command, args)


def _default_jobs(device: torch.device) -> int:
    return SIDE_BY_SIDE if device.type == "cuda" else cores()
