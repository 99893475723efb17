"""The command ``pra``: thin. Every subcommand is a function whose docstring is its help; its options are keywords."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, arg

from pra import flops, images, weights
from pra.arguments import check_arguments, join_command, options_of
from pra.config import GuidanceSchedule, RunConfig, SamplingConfig, Solver, apply_settings, from_dict, override, to_dict
from pra.data import open_source
from pra.data.command import check_command, pack_command
from pra.demo.command import demo_command
from pra.device import pick_device
from pra.errors import PraError, nearest
from pra.eval.command import evaluate_command
from pra.eval.probe_command import features_command, probe_command
from pra.generate import Sampler, check_completes
from pra.hub.command import export_command, push_command
from pra.hub.download import is_address
from pra.models import count_parameters
from pra.options import Flag, Folder, Integer, Number, Settings, Text, parse_numbers
from pra.provenance import package_version
from pra.recipes import RECIPES, own, recipe
from pra.report.command import report_command
from pra.report.page import REPORT, write_report
from pra.studies.command import study_command
from pra.train.loop import Interrupted
from pra.train.loop import train as run_training
from pra.train.run import read_run
from pra.weights import CONFIG


def _choices(kind: type[enum.Enum]) -> str:
    return "|".join(member.value for member in kind)


@dataclasses.dataclass(frozen=True)
class How:
    """Sampling options, the same for every command that samples."""

    guidance: Number = None
    """Guidance scale; 1 is none."""
    schedule: Annotated[str | None, arg(metavar=_choices(GuidanceSchedule), help_behavior_hint="")] = None
    """Guidance along the raster, where there is one."""
    solver: Annotated[str | None, arg(metavar=_choices(Solver), help_behavior_hint="")] = None
    """Integrator from noise to pixels or states."""
    steps: Integer = None
    """Solver intervals per patch, or per image where all patches come at once."""
    temperature: Number = None
    """Scale of the noise."""
    raw_weights: Flag = False
    """Take the raw weights, not their moving average."""
    device: Text = None
    """cpu, cuda, cuda:1 or mps; by default the best there is."""

    def sampler(self, run: Path | None) -> Sampler:
        """The run's model (without a run, the shipped one) on its device, with its own settings but for those given."""
        model = weights.load(run, ema=not self.raw_weights, device=pick_device(self.device))
        settings = to_dict(model.sampling)
        given = {name: getattr(self, name, None) for name in settings}
        settings |= {name: value for name, value in given.items() if value is not None}
        return Sampler(model, from_dict(SamplingConfig, settings, "sampling"))


SamplingOptions = Annotated[How, arg(name="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 0, 2 for bad input, 128 + signal when interrupted."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    args = list(sys.argv[1:] if argv is None else argv)
    version = package_version("pra") or "(not installed)"
    if args == ["--version"]:
        print(f"pra {version}")
        return 0
    # What is wrong with the line, torchrun's processes all find.
    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
    try:
        words = join_command(COMMANDS, args)
        check_arguments(COMMANDS, words)
    except PraError as error:
        return _refuse(error) if first else 2
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="pra",
            args=words,
            description=f"Autoregressive image generation in pixel space (PRA), version {version}.",
            config=(FlagCreatePairsOff,),
            console_outputs=first,
        )
    except PraError as error:
        return _refuse(error)
    except PermissionError as error:
        return _refuse(f"{error.filename} is closed to you ({error.strerror})")
    except Interrupted as stop:
        print(f"pra: {stop}: {shlex.join(['pra', *args])}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("pra: interrupted", file=sys.stderr)
        return 130
    return 0


def _refuse(reason: object) -> int:
    print(f"pra: error: {reason}", file=sys.stderr)
    return 2


def train(
    recipe_name: Annotated[Positional[str], arg(metavar="RECIPE", help_behavior_hint="")] = "",
    *,
    data: Text = None,
    minutes: Number = None,
    run_dir: Folder = None,
    steps: Integer = None,
    seed: Integer = None,
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Train a recipe, or go on with a run. Without a recipe, a model is chosen for your own pictures.

    The same command on the same folder goes on from its last checkpoint; a larger --steps trains longer.

    Args:
        recipe_name: A recipe (see `pra show`), or RECIPE:SYSTEM for another of the paper's systems. Without one, the
            pictures of --data are looked at, and a model and its training are chosen for them and this machine.
        data: Where the images are: folder:PATH, wds:PATTERN, hf:NAME, imagenet-tar:PATH, idx:DIR, digits or emoji. By
            default the recipe's.
        minutes: How long training may take where there is no RECIPE; by default 30.
        run_dir: The run's folder; by default runs/RECIPE, or runs/own-PHOTOS.
        steps: Steps in all, those already done included.
        seed: Decides initial weights, data order and noise.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: Any other setting that `pra show RECIPE` lists, such as train.optimizer.lr=1e-4; may be repeated.
    """
    if recipe_name and minutes is not None:
        raise PraError("--minutes is for your own pictures, without a RECIPE; a recipe's length is --steps")
    target, folder = pick_device(device), (run_dir or _run_folder(recipe_name, data)).expanduser()
    if recipe_name:
        config = recipe(recipe_name)
    else:
        config, told = own.configure(data, folder, minutes, target)
        print(*told, sep="\n")
    for path, value in (("data.source", data), ("train.steps", steps), ("train.seed", seed)):
        if value is not None:
            config = override(config, path, json.dumps(value))
    config = apply_settings(config, settings)
    source = open_source(config.data.source)
    if len(source.classes) != config.model.num_classes:
        print(f"classes: {len(source.classes)} in {source.name} (the recipe has {config.model.num_classes})")
        config = override(config, "model.num_classes", str(len(source.classes)))
    print(f"run: {folder}, recipe {config.recipe}, {len(source)} images from {source.name}, on {target}")
    result = run_training(config, folder, device=str(target), source=source)
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
    print(f"next: pra sample {folder} --out samples.png")


def sample(
    run: Annotated[Positional[Path | None], arg(metavar="RUN", help_behavior_hint="")] = None,
    *,
    labels: Annotated[str, arg(metavar="TEXT")] = "all",
    seeds: Annotated[str, arg(metavar="TEXT")] = "0-7",
    out: Path = Path("samples.png"),
    batch_size: int = 256,
    how: SamplingOptions = How(),
) -> None:
    """Generate one image for each pair of label and seed.

    What is not said is taken from the recipe; the weights are the EMA's.

    Args:
        run: A run's folder, a checkpoint, a saved model or hub:user/model; by default the model that comes with pra.
        labels: Classes by number or name, such as 0,3 or 2-5 or cat,dog; or all. Where classes are named by numbers, 2
            is the one of that name and 2-2 the one of that number.
        seeds: Seeds, such as 0-15 or 1,2,3. A seed means the same image in every batch.
        out: FILE.png (a grid, labels down, seeds across), FILE.npz (arr_0 uint8 NHWC, arr_1 labels) or DIR/.
        batch_size: Images generated side by side; no image depends on it.
        how: How to sample; by default as the recipe recommends.
    """
    out = out.expanduser()
    images.check_output(out)
    sampler = how.sampler(run)
    chosen = _unique(parse_labels(labels, sampler.model.classes))
    numbers = _unique(parse_numbers(seeds, "--seeds"))
    pairs = [(label, seed) for label in chosen for seed in numbers]
    pictures = _in_batches(
        pairs,
        batch_size,
        lambda batch: sampler.sample([label for label, _ in batch], [seed for _, seed in batch]),
    )
    names = [f"{label:04d}-{_file_name(sampler.model.classes[label])}-seed{seed:06d}" for label, seed in pairs]
    images.save(pictures, [label for label, _ in pairs], names, len(numbers), out)
    print(f"{len(pairs)} images ({len(chosen)} labels x {len(numbers)} seeds): {out}")


def complete(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    image: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint="")],
    *,
    rows: int,
    label: Text = None,
    seeds: Annotated[str, arg(metavar="TEXT")] = "0-5",
    out: Path = Path("completions.png"),
    how: SamplingOptions = How(),
) -> None:
    """Continue real images from their first rows of patches.

    A grid shows, per image, the image, what was kept of it, and one continuation per seed.

    Args:
        run: A run's folder, a checkpoint, a saved model or hub:user/model; where a picture comes first, the model that
            comes with pra.
        image: Pictures of the model's size and channels, at least one.
        rows: Rows of patches to keep; their pixels stay exact.
        label: Class by number or name (as `pra sample --labels`), one for all images or one each; by default none.
        seeds: One continuation per seed, such as 0-5.
        out: FILE.png (a grid; the picture alone for one image and one seed), FILE.npz or DIR/ (continuations).
        how: How to sample; by default as the recipe recommends.
    """
    out = out.expanduser()
    images.check_output(out)
    model: Path | None = run
    if run.is_file():
        model, image = None, (run, *image)
    if not image:
        raise PraError("no IMAGE given: name at least one picture to complete")
    sampler = how.sampler(model)
    check_completes(sampler.model)
    config = sampler.model.config
    real = torch.stack([_read_picture(path, config.channels, config.image_size) for path in image])
    chosen = [config.null_class] if label is None else parse_labels(label, sampler.model.classes)
    if len(chosen) not in (1, len(image)):
        raise PraError(f"--label {label!r} means {len(chosen)} classes for {len(image)} images: give one, or one each")
    numbers = _unique(parse_numbers(seeds, "--seeds"))
    repeated = real.repeat_interleave(len(numbers), dim=0)
    classes = [number for number in chosen * (len(image) // len(chosen)) for _ in numbers]
    continued = sampler.complete(repeated, rows, classes, numbers * len(image)).cpu()
    # Numbered, for pictures of the same name from different folders.
    names = [f"{place:04d}-{path.stem}-seed{seed:06d}" for place, path in enumerate(image) for seed in numbers]
    pictures, columns = continued, len(numbers)
    if images.ending(out) == ".png" and len(continued) > 1:
        kept = real.clone()
        kept[:, :, rows * config.patch_size :] = 0.0
        groups = continued.view(len(image), columns, *continued.shape[1:])
        pictures = torch.cat([real.unsqueeze(1), kept.unsqueeze(1), groups], dim=1).flatten(0, 1)
        columns += 2
    images.save(pictures, classes, names, columns, out)
    print(f"{len(image)} images continued from {rows} of {config.grid[0]} rows, {len(numbers)} times each: {out}")


def show(
    name: Annotated[Positional[str], arg(metavar="RECIPE|RUN", help_behavior_hint="")] = "",
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
    config = _recipe_or_run(name)
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
    "sample": sample,
    "complete": complete,
    "eval": evaluate_command,
    "probe": probe_command,
    "features": features_command,
    "report": report_command,
    "study": study_command,
    "data check": check_command,
    "data pack": pack_command,
    "demo": demo_command,
    "push": push_command,
    "export": export_command,
    "show": show,
}


def parse_labels(text: str, classes: Sequence[str]) -> list[int]:
    """``"all"``, numbers, ranges or class names, mixed, to class numbers.

    A class of exactly that name comes before a number, with a warning where they differ; a range, and be it ``2-2``,
    is always of numbers.

    Raises:
        PraError: a number out of range, or a name that no class has (the nearest is given).
    """
    if text == "all":
        return list(range(len(classes)))
    labels: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part in classes:
            labels.append(classes.index(part))
            _warn_of_number(part, classes)
        elif part.replace("-", "").isdecimal():
            labels.extend(parse_numbers(part, "label"))
        else:
            raise PraError(f"no class {part!r}{nearest(part, classes)}")
    wrong = [label for label in labels if label >= len(classes)]
    if wrong:
        raise PraError(f"label {wrong[0]} is out of range: this model's classes are 0 to {len(classes) - 1}")
    return labels


def _warn_of_number(name: str, classes: Sequence[str]) -> None:
    """Folders named by numbers are classes in the order of text: 1, 10, 2."""
    meant = classes.index(name)
    if re.fullmatch(r"\d+", name, re.ASCII) and meant != int(name) < len(classes):
        warnings.warn(
            f"label {name} is taken for the class named {name!r}, which is number {meant}; class number {int(name)} is "
            f"named {classes[int(name)]!r}, and {int(name)}-{int(name)} means that",
            stacklevel=2,
        )


def _unique(numbers: list[int]) -> list[int]:
    """Without repeats: the same label and seed is the same image, and the same file."""
    return list(dict.fromkeys(numbers))


def _run_folder(recipe_name: str, data: str | None) -> Path:
    if recipe_name:
        return Path("runs") / recipe_name.replace(":", "-")
    if data is None:
        raise PraError("pra train needs RECIPE, or --data folder:PHOTOS for your own pictures; see `pra train --help`")
    return own.run_folder(data)


def _write_report(folder: Path) -> None:
    """What stands in its way, such as a damaged file of figures, does not make a training a failure."""
    try:
        write_report(folder)
    except PraError as error:
        warnings.warn(f"no report: {error}", stacklevel=2)


def _in_batches(items: list[Any], size: int, work: Callable[[list[Any]], Tensor]) -> Tensor:
    if size < 1:
        raise PraError(f"--batch-size {size} must be at least 1")
    done, begin = [], time.monotonic()
    with tqdm(total=len(items), unit="image", desc="sample", dynamic_ncols=True) as bar:
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            done.append(images.to_uint8(work(batch)).cpu())
            bar.update(len(batch))
    seconds = time.monotonic() - begin
    print(f"{len(items) / seconds:.1f} images/s")
    return torch.cat(done)


def _read_picture(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(path) as opened:
            picture = opened.copy()
    except Exception as error:  # on broken bytes Pillow's plugins raise whatever they stumble over
        raise PraError(f"{path} cannot be read as a picture: {error}; give another IMAGE") from None
    if picture.mode in ("1", "P"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    wanted = images.MODES.get(channels)
    if picture.size != (size[1], size[0]) or picture.mode != wanted:
        raise PraError(
            f"{path} is {picture.width}x{picture.height} (width x height) with {len(picture.getbands())} channels "
            f"({picture.mode}); this model completes pictures of {size[1]}x{size[0]} with {channels} ({wanted}): "
            "resize or convert it first"
        )
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return images.from_uint8(pixels.view(*size, channels).permute(2, 0, 1))


def _recipe_or_run(name: str) -> RunConfig:
    if is_address(name):
        raise PraError(f"{name} is a model, not a run: its card, on its page, says what it is; give a recipe or a run")
    folder = Path(name).expanduser()
    if (folder / CONFIG).exists() or (folder.is_dir() and name not in RECIPES):
        return read_run(folder)
    try:
        return recipe(name)
    except PraError as error:
        raise PraError(f"no run at {name}, and {error}") from None


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


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


def option_names(command: str) -> list[str]:
    """``["--data", "--run-dir", ...]``: a command's keywords, in its sampling options too."""
    return list(options_of(COMMANDS[command]))


def _warn(message: Warning | str, *_: Any) -> None:
    tqdm.write(f"pra: warning: {message}", file=sys.stderr)
