"""The command ``pra``: thin. Every subcommand is a function whose docstring is its help; its options are keywords."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from pra.commands.arguments import HELP, check_arguments, join_command, options_of
from pra.commands.average import average_command
from pra.commands.bench_sample import bench_command
from pra.commands.bench_train import bench_train_command
from pra.commands.compare import compare_command
from pra.commands.complete import complete_command
from pra.commands.data import check_command, pack_command
from pra.commands.demo import demo_command
from pra.commands.eval import evaluate_command
from pra.commands.grid import grid_command
from pra.commands.options import Average, Flag, Folder, Integer, Number, Settings, Text
from pra.commands.probe import features_command, probe_command
from pra.commands.report import report_command
from pra.commands.sample import sample_command
from pra.commands.share import export_command, push_command
from pra.commands.sweep import sweep_command
from pra.config import RunConfig, apply_settings, override, to_dict
from pra.data import open_source
from pra.data.source import check_name
from pra.errors import PraError
from pra.evaluation import flops
from pra.evaluation.report.page import REPORT, write_report
from pra.models import count_parameters, weights
from pra.recipes import RECIPES, fine_tune, own, recipe
from pra.recipes import distill as distillation
from pra.recipes.named import recipe_or_run
from pra.training.loop import Trained
from pra.training.loop import train as run_training
from pra.training.run import check_run, checked_source
from pra.utils.distributed import join
from pra.utils.progress import Progress
from pra.utils.provenance import DISTRIBUTION, package_version
from pra.utils.signals import Interrupted

VERBOSE = {"-v", "--verbose"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``pra`` and return its exit code (:func:`run_program`)."""
    return run_program("pra", _parse, argv)


def _parse(args: list[str]) -> Callable[[], object]:
    """Check a command line of ``pra`` and return what runs it."""
    version = package_version(DISTRIBUTION) or "(not installed)"
    if args == ["--version"]:
        return partial(print, f"pra {version}")
    if args[:1] == ["study"]:
        moved = shlex.join(["python", "-m", "studies", *args[1:]])
        raise PraError(f"pra study: studies left the package. Clone the repository and run there: {moved}")
    words = join_command(COMMANDS, args)
    check_arguments(COMMANDS, words)
    group = f"{args[0]} " if words[0] in HELP and args[0] not in HELP else ""  # `pra data --help`
    return partial(
        tyro.extras.subcommand_cli_from_dict,
        {name.removeprefix(group): command for name, command in COMMANDS.items() if name.startswith(group)},
        prog=f"pra {group}".strip(),
        args=words,
        description=f"Autoregressive image generation in pixel space (PRA), version {version}. "
        "With -v or --verbose every command says more of how it works.",
        config=(FlagCreatePairsOff,),
        console_outputs=_reports(),
    )


def run_program(
    program: str, parse: Callable[[list[str]], Callable[[], object]], argv: Sequence[str] | None = None
) -> int:
    """Run a command line; bad input and interruptions become one line on stderr.

    Args:
        program: what people type before the arguments, such as ``pra``.
        parse: checks the arguments without ``-v`` and returns the work; raises :class:`PraError`.
        argv: the arguments; by default those of this process.

    Returns:
        The exit code: 0, 2 for bad input, 128 + signal when interrupted.
    """
    warnings.showwarning = _warn  # type: ignore[assignment]
    args = _without_verbose(list(sys.argv[1:] if argv is None else argv))
    try:
        work = parse(args)
    except PraError as error:
        # Every rank parses the same command line, so only rank 0 reports errors.
        return _refuse(error) if _reports() else 2
    try:
        work()
    except PraError as error:
        return _refuse(error)
    except PermissionError as error:
        return _refuse(f"{error.filename} is closed to you ({error.strerror})")
    except Interrupted as stop:
        if _reports():
            print(f"pra: {stop}: {program} {shlex.join(args)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("pra: interrupted", file=sys.stderr)
        return 130
    return 0


def _reports() -> bool:
    """Return whether this process is rank 0 under torchrun, or was started without torchrun."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _without_verbose(args: list[str]) -> list[str]:
    """The words of a command but for ``-v`` and ``--verbose``, which let the package's loggers speak."""
    logger = logging.getLogger("pra")
    if not VERBOSE & set(args):
        logger.setLevel(logging.WARNING)
        return args
    logging.basicConfig(format="pra: %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    return [word for word in args if word not in VERBOSE]


def _refuse(reason: object) -> int:
    print(f"pra: error: {reason}", file=sys.stderr)
    return 2


def train(
    recipe_name: Annotated[Positional[str], arg(metavar="[RECIPE]", help_behavior_hint="")] = "",
    *,
    data: Text = None,
    from_: Annotated[Text, arg(name="from", metavar="RUN")] = None,
    minutes: Number = None,
    run_dir: Folder = None,
    steps: Integer = None,
    seed: Integer = None,
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Train a recipe, or go on with a run. Without a recipe, a model is chosen, or fine-tuned, for your own pictures.

    The same command on the same folder goes on from its last checkpoint; a larger --steps trains longer. Several
    processes share every batch: torchrun --nproc-per-node 8 -m pra train RECIPE.

    Args:
        recipe_name: A recipe (see `pra show`), or RECIPE:SYSTEM for another of the paper's systems. Without one, the
            pictures of --data are looked at, and a model and its training are chosen for them and this machine.
        data: Where the images are: folder:PATH, wds:PATTERN, hf:NAME, imagenet-tar:PATH, idx:DIR, digits or emoji. By
            default the recipe's.
        from_: What to fine-tune to --data, whatever its classes: a run's folder, a saved model or hub:user/model.
        minutes: How long training may take where there is no RECIPE, decided when the run begins; by default 30.
        run_dir: The run's folder; by default runs/RECIPE, runs/own-PHOTOS, or runs/own-PHOTOS-from-RUN.
        steps: Steps in all, those already done included; where there is no RECIPE, in place of --minutes.
        seed: Decides initial weights, data order and noise.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: Any other setting that `pra show RECIPE` lists, such as train.optimizer.lr=1e-4; may be repeated.
    """
    _check_combination(recipe_name, from_, minutes, steps)
    folder = (run_dir or _run_folder(recipe_name, data, from_)).expanduser()
    with join() as world:
        say, target = print if world.is_first else _say_nothing, world.device(device)
        if data is not None:
            check_name(data)  # first, as a slip there looks like another run's configuration
        if recipe_name:
            config = recipe(recipe_name)
        else:  # measured in the first process, for all
            config, told = world.run_on_first(lambda: _configure(from_, data, folder, minutes, steps, target, settings))
            say(*told, sep="\n")
        for path, value in (("data.source", data), ("train.steps", steps), ("train.seed", seed)):
            if value is not None:
                config = override(config, path, json.dumps(value))
        config = apply_settings(config, settings)
        # Before the data are opened, which may take an hour.
        config.train.micro_batches(world.size)
        check_run(folder, config, classes_known=False)
        with world.first_alone():  # some sources are indexed once
            source = open_source(config.data.source)
        if len(source.classes) != config.model.num_classes:
            say(f"classes: {len(source.classes)} in {source.name} (the recipe has {config.model.num_classes})")
            config = override(config, "model.num_classes", str(len(source.classes)))
        checked_source(folder, config, source)
        where = (
            f"{target}" if world.size == 1 else f"{world.size} processes ({target.type}, {config.train.parallel.value})"
        )
        # A slip in --run-dir shows here.
        begun = "goes on" if folder.is_dir() and weights.checkpoints(folder) else "new"
        say(f"run: {folder} ({begun}), recipe {config.recipe}, {len(source)} images from {source.name}, on {where}")
        result = run_training(config, folder, device=str(target), source=source, world=world)
    if world.is_first:
        _tell(result, config, folder)


def distill(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    average: Average = weights.EMA,
    run_dir: Folder = None,
    steps: Integer = None,
    seed: Integer = None,
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Teach a trained run to sample in few evaluations: a second head learns steps of the first one's flow.

    All other weights stay as they are. The new run is sampled with 4 evaluations a patch, or --steps 1, 2 or 8; with
    another --solver as before. The same command goes on from its last checkpoint.

    Args:
        run: The run's folder.
        average: Which of its weights to begin with: ema, raw, or another of its averages, such as power-0.05.
        run_dir: The new run's folder; by default RUN-distilled.
        steps: Steps in all, those already done included; by default 2000.
        seed: Decides data order and noise.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: Any other setting, such as train.optimizer.lr=1e-4; may be repeated.
    """
    folder = (run_dir or distillation.run_folder(run)).expanduser()
    with join() as world:
        config = distillation.configure(run, steps, average)
        if seed is not None:
            config = override(config, "train.seed", json.dumps(seed))
        config = apply_settings(config, settings)
        target = world.device(device)
        result = run_training(config, folder, device=str(target), world=world)
    if world.is_first:
        _tell(result, config, folder)


def _check_combination(recipe_name: str, start: str | None, minutes: float | None, steps: int | None) -> None:
    if start and recipe_name:
        raise PraError(f"--from {start} brings its own model and settings: leave the RECIPE {recipe_name} out")
    if recipe_name and minutes is not None:
        raise PraError("--minutes is for your own pictures, without a RECIPE; a recipe's length is --steps")
    if minutes is not None and steps is not None:
        raise PraError("--minutes and --steps both say how long to train: leave one out")


def _configure(
    start: str | None,
    data: str | None,
    folder: Path,
    minutes: float | None,
    steps: int | None,
    device: torch.device,
    settings: Sequence[str],
) -> tuple[RunConfig, list[str]]:
    """Of a run without a recipe, and the lines that say why."""
    begun = (folder / weights.CONFIG).exists()
    if start:
        if not begun:
            fine_tune.check_settings(start, settings)  # before the pictures are looked at, and steps are timed
        config, told = fine_tune.configure(start, data, folder, minutes, steps, device)
    else:
        config, told = own.configure(data, folder, minutes, steps, device)
    if begun and minutes is not None:
        kept = f"this one keeps its {config.train.steps} steps, and a larger --steps trains longer"
        told = [*told, f"--minutes {minutes:g} has no effect here, it counts when a run begins: {kept}"]
    return config, told


def _say_nothing(*_: object, **__: object) -> None:
    """In place of print, in processes that do not lead."""


def _tell(result: Trained, config: RunConfig, folder: Path) -> None:
    """What was trained, and where it lies."""
    skipped = f", {result.skipped} corrupt images skipped" if result.skipped else ""
    if result.new_steps:
        print(f"trained {result.new_steps} steps to {result.steps} in {result.seconds:.0f} s{skipped}")
    else:
        print(
            f"nothing to train: the run has {result.steps} steps already and {config.train.steps} are asked for; "
            "a larger --steps goes on"
        )
    for name, what in (("samples", "samples"), ("reconstructions", "reconstructions")):
        pictures = sorted((folder / name).glob("*.png"))
        if pictures:
            print(f"  {what}: {pictures[-1]}")
    if result.new_steps:
        _write_report(folder)
    for name in (REPORT, "curves.png", "metrics.jsonl", "checkpoints"):
        if (folder / name).exists():
            print(f"  {name.split('.')[0]}: {folder / name}")
    print("next:", shlex.join(["pra", "sample", str(folder)]))


def show(
    name: Annotated[Positional[str], arg(metavar="[RECIPE|RUN]", help_behavior_hint="")] = "",
    *,
    json: Flag = False,
) -> None:
    """Show a recipe or a run: configuration, parameters, arithmetic. Without a name, list the recipes.

    Args:
        name: A recipe, or a run's folder.
        json: Machine-readable.
    """
    if not name:
        for base, build in RECIPES.items():
            print(f"{base:12} {(build.__doc__ or '').strip().splitlines()[0]}")
        return
    config = recipe_or_run(name)
    parts = count_parameters(config.model)
    parameters = {"total": sum(parts.values()), **parts}
    sampling = flops.sampling_flops(config)
    arithmetic = {
        "training": flops.training_flops(config),
        "sampling": {"total": sum(sampling.values()), **sampling},
    }
    report = {"config": to_dict(config), "parameters": parameters, "flops_per_image": arithmetic}
    print(_dump(report) if json else _describe(report))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "distill": distill,
    "sample": sample_command,
    "complete": complete_command,
    "grid": grid_command,
    "average": average_command,
    "eval": evaluate_command,
    "sweep": sweep_command,
    "probe": probe_command,
    "features": features_command,
    "report": report_command,
    "compare": compare_command,
    "data check": check_command,
    "data pack": pack_command,
    "demo": demo_command,
    "push": push_command,
    "export": export_command,
    "bench sample": bench_command,
    "bench train": bench_train_command,
    "show": show,
}


def _run_folder(recipe_name: str, data: str | None, start: str | None) -> Path:
    if recipe_name:
        return Path("runs") / recipe_name.replace(":", "-")
    if data is None:
        raise PraError("pra train needs RECIPE, or --data folder:PHOTOS for your own pictures; see `pra train --help`")
    return fine_tune.run_folder(start, data) if start else own.run_folder(data)


def _write_report(folder: Path) -> None:
    """What stands in its way, such as a damaged file of figures, does not make a training a failure."""
    try:
        write_report(folder)
    except PraError as error:
        warnings.warn(f"no report: {error}", stacklevel=2)


def _describe(report: dict[str, Any]) -> str:
    """The report for a person: one setting a line, counts in millions, arithmetic in GFLOPs."""
    lines: list[str] = []

    def walk(values: dict[str, Any], depth: int) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                lines.append("  " * depth + key)
                walk(value, depth + 1)
            else:
                shown = " x ".join(map(str, value)) if isinstance(value, list) else value
                lines.append(f"{'  ' * depth}{key:<{max(1, 26 - 2 * depth)}} {shown}")

    walk(report["config"], 0)
    lines.append("parameters")
    for part, count in report["parameters"].items():
        lines.append(f"  {part:<24} {count / 1e6:.3f} M")
    lines.append("GFLOPs per image")
    arithmetic = report["flops_per_image"]
    lines.append(f"  {'training':<24} {arithmetic['training'] / 1e9:.4g}")
    for part, count in arithmetic["sampling"].items():
        lines.append(f"  {'sampling ' + part:<24} {count / 1e9:.4g}")
    return "\n".join(lines)


def _dump(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def option_names(command: str) -> list[str]:
    """``["--data", "--run-dir", ...]``: a command's keywords, in its sampling options too."""
    return list(options_of(COMMANDS[command]))


def _warn(message: Warning | str, *_: Any) -> None:
    Progress.write(f"pra: warning: {message}", file=sys.stderr)
