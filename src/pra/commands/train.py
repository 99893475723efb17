"""The command ``pra train``."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from pra.commands.options import Device, Folder, Integer, Number, Settings, Text
from pra.config import RunConfig, apply_settings, override
from pra.data import Source, open_source
from pra.data.source import check_name
from pra.data.survey import look
from pra.errors import PraError, counted, escaped
from pra.evaluation.report import REPORT, write_report
from pra.models import weights
from pra.recipes import fine_tune, own, recipe
from pra.training.callbacks import Length
from pra.training.loop import Trained, Trainer
from pra.training.run import claimed, class_count, read_run
from pra.utils.distributed import join


def train_command(
    recipe_name: Annotated[Positional[str], arg(metavar="[RECIPE]", help_behavior_hint="")] = "",
    *,
    data: Text = None,
    from_: Annotated[Text, arg(name="from", metavar="RUN")] = None,
    minutes: Number = None,
    run_dir: Folder = None,
    steps: Integer = None,
    seed: Integer = None,
    device: Device = None,
    settings: Settings = (),
) -> None:
    """Train a recipe, or resume a run. Without a recipe, choose or fine-tune a model for your own pictures.

    The same command on the same folder resumes from its last checkpoint; a larger --steps trains longer. Several
    processes share every batch: torchrun --nproc-per-node 8 -m pra train RECIPE.

    Args:
        recipe_name: A recipe (see `pra show`), or RECIPE:SYSTEM for another of the paper's systems. Without a recipe,
            pra looks at the pictures of --data and chooses a model for them and this machine.
        data: The images: folder:PATH, wds:PATTERN, hf:NAME, imagenet-tar:PATH, idx:DIR, digits or emoji. By default the
            recipe's.
        from_: The model to fine-tune to --data, whatever its classes: a run's folder, a saved model or hub:user/model.
        minutes: Length of a training without RECIPE, decided when the run begins; by default 30.
        run_dir: The run's folder; by default runs/RECIPE, runs/own-PHOTOS, or runs/own-PHOTOS-from-RUN.
        steps: Total number of steps, including those already done; without RECIPE, in place of --minutes.
        seed: Decides initial weights, data order and noise.
        settings: Any other setting that `pra show RECIPE` lists, such as train.optimizer.lr=1e-4; may be repeated.
    """
    _check_options(recipe_name, from_, minutes, steps)
    folder = (run_dir or _run_folder(recipe_name, data, from_)).expanduser()
    with join() as world:
        target = world.device(device)

        def say(*lines: str) -> None:
            if world.is_first:
                print(*map(escaped, lines), sep="\n")

        if data is not None:
            check_name(data)  # first: a typo there looks like another configuration
        if recipe_name:
            config, length = recipe(recipe_name), None
        else:  # rank 0 measures, for all
            config, told, length = world.run_on_first(lambda: _configure(from_, data, folder, minutes, steps, target))
            say(*told)
        planned = config.train.steps
        config = changed(config, {"data.source": data, "train.steps": steps, "train.seed": seed}, settings)
        with claimed(folder, config, world, losses={}):
            with world.first_alone():  # some sources are indexed once
                source = open_source(config.data.source)
            if (classes := class_count(folder, source)) != config.model.num_classes:
                say(f"classes: {classes} in {source.name} (the recipe has {config.model.num_classes})")
                config = override(config, "model.num_classes", str(classes))
            length = length if config.train.steps == planned else None
            trainer = Trainer(config, folder, target, world, source, length=length)
            say(_heading(trainer, source))
            result = trainer.run()
    if world.is_first:
        tell(result, config, folder)


def _heading(trainer: Trainer, source: Source) -> str:
    """Return the line that names the run, its data and its device."""
    config, world, device = trainer.config, trainer.world, trainer.device
    many = f"{world.size} processes ({device.type}, {config.train.parallel.value})"
    where = device if world.size == 1 else many
    begun = "resumed" if trainer.step else "new"  # a typo in --run-dir shows here
    images = f"{counted(len(source), 'image')} from {source.name}"
    return f"run: {trainer.folder} ({begun}), recipe {config.recipe}, {images}, on {where}"


def _check_options(recipe_name: str, from_: str | None, minutes: float | None, steps: int | None) -> None:
    if recipe_name and (from_ or minutes is not None):
        problem = "--from and --minutes are for your own pictures. Leave them out, or the RECIPE"
        raise PraError(f"{recipe_name}: {problem}", code="conflict")
    if minutes is not None and steps is not None:
        raise PraError("--minutes and --steps both say how long to train. Leave one out", code="conflict")


def changed(config: RunConfig, given: Mapping[str, Any], settings: Sequence[str]) -> RunConfig:
    """Return the configuration with the options that are not ``None``, by their paths, and the lines of --set."""
    for path, value in given.items():
        if value is not None:
            config = override(config, path, json.dumps(value))
    return apply_settings(config, settings)


def tell(result: Trained, config: RunConfig, folder: Path) -> None:
    """Print the result and its place, and write the report."""
    skipped = f", {counted(result.skipped, 'corrupt image')} skipped" if result.skipped else ""
    if result.new_steps:
        print(f"trained {counted(result.new_steps, 'step')} to {result.steps} in {result.seconds:.0f} s{skipped}")
    else:
        asked = f"{config.train.steps} are asked for. Use a larger --steps to train longer"
        print(f"nothing to train: the run has {counted(result.steps, 'step')} already and {asked}")
    for name in ("samples", "reconstructions"):
        pictures = sorted((folder / name).glob("*.png"))
        if pictures:
            print(f"  {name}: {pictures[-1]}")
    if result.new_steps:
        try:
            write_report(folder)
        except PraError as error:  # such as a damaged file of figures: the training itself is fine
            warnings.warn(f"no report: {error}", stacklevel=2)
    for name in (REPORT, "curves.png", "metrics.jsonl", "checkpoints"):
        if (folder / name).exists():
            print(f"  {name.split('.')[0]}: {folder / name}")
    print("next:", shlex.join(["pra", "sample", str(folder)]))


def _run_folder(recipe_name: str, data: str | None, start: str | None) -> Path:
    if recipe_name:
        return Path("runs") / recipe_name.replace(":", "-")
    if data is None:
        problem = "pra train needs RECIPE, or --data folder:PHOTOS for your own pictures; see `pra train --help`"
        raise PraError(problem, code="missing")
    return fine_tune.run_folder(start, data) if start else own.run_folder(data)


def _configure(
    start: str | None,
    data: str | None,
    folder: Path,
    minutes: float | None,
    steps: int | None,
    device: torch.device,
) -> tuple[RunConfig, list[str], Length | None]:
    """Return the configuration of a run without a recipe, the lines that explain it, and its length in minutes."""
    if (folder / weights.CONFIG).exists():
        config, told = read_run(folder), [f"settings: those of {folder}, chosen when it began"]
        if start and (config.initial is None or Path(config.initial) != Path(start)):  # runs/a/ is runs/a
            config = replace(config, initial=start)  # another run: training refuses it and names both
        if minutes is not None:
            kept = f"this one keeps its {config.train.steps} steps, and a larger --steps trains longer"
            told.append(f"--minutes {minutes:g} has no effect on a run that has begun: {kept}")
        return config, told, None
    if data is None:
        problem = f"no run at {folder} to resume. Name a RECIPE, or your own pictures with --data folder:PHOTOS"
        raise PraError(problem, code="missing", path=folder)
    if start:
        base = weights.model_folder(start)
        model, run, survey = weights.read_config(base), weights.run_of(base), look(data)
        config, reasons = fine_tune.propose(
            start, model, read_run(run) if run else None, survey, minutes, steps, device
        )
    else:
        survey = look(data)
        config, reasons = own.propose(survey, minutes, steps, device)
    length, batch = None, config.train.batch_size
    if steps is None:
        longest = fine_tune.longest_training(survey, batch) if start else own.longest_training(survey)
        steps_at = partial(own.steps_in, own.seconds_of(minutes), longest=longest, batch=batch)
        length = Length(own.MINUTES if minutes is None else minutes, steps_at)
    found, heading = [f"  {line}" for line in survey.lines()], f"from {start}:" if start else "chosen:"
    return config, [f"found in {survey.source}:", *found, heading, *(f"  {reason}" for reason in reasons)], length
