"""The command ``pra``: thin. Every subcommand is a function whose docstring is its help."""

from __future__ import annotations

import dataclasses
import json
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
from tyro.conf import Positional, UseAppendAction, arg

from pra import flops, images, weights
from pra.config import GuidanceSchedule, RunConfig, SamplingConfig, Solver, override, to_dict
from pra.data import open_source
from pra.device import pick_device
from pra.errors import PraError, nearest
from pra.generate import Sampler
from pra.models.pra import PRA
from pra.recipes import RECIPES, recipe
from pra.train.loop import Interrupted
from pra.train.loop import train as run_training
from pra.train.run import read_run

Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code: 0, 2 for bad input, 128 + signal when interrupted."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    commands: dict[str, Callable[..., None]] = {
        "train": train,
        "sample": sample,
        "complete": complete,
        "show": show,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="pra",
            args=argv,
            description="Autoregressive image generation in pixel space (PRA).",
        )
    except PraError as error:
        print(f"pra: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"pra: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("pra: interrupted", file=sys.stderr)
        return 130
    return 0


def train(
    recipe_name: Annotated[Positional[str], arg(metavar="RECIPE")],
    data: str | None = None,
    run_dir: Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    settings: Settings = (),
) -> None:
    """Train a recipe, or go on with a run.

    The same command on the same folder goes on from its last checkpoint; a larger --steps trains longer.

    Args:
        recipe_name: A recipe (see `pra show`), or RECIPE:SYSTEM for another of the paper's systems.
        data: Where the images are: digits, folder:PATH, imagenet-tar:PATH or idx:DIR. By default the recipe's.
        run_dir: The run's folder; by default runs/RECIPE.
        steps: Steps in all, those already done included.
        seed: Decides initial weights, data order and noise.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: Any other setting, such as train.optimizer.lr=1e-4; may be repeated.
    """
    config = recipe(recipe_name)
    for path, value in (("data.source", data), ("train.steps", steps), ("train.seed", seed)):
        if value is not None:
            config = override(config, path, json.dumps(value))
    config = _apply(config, settings)
    folder = run_dir or Path("runs") / recipe_name.replace(":", "-")
    source = open_source(config.data.source)
    if len(source.classes) != config.model.num_classes:
        print(f"classes: {len(source.classes)} in {source.name} (the recipe has {config.model.num_classes})")
        config = override(config, "model.num_classes", str(len(source.classes)))
    target = pick_device(device)
    print(f"run: {folder}, recipe {recipe_name}, {len(source)} images from {source.name}, on {target}")
    result = run_training(config, folder, device=str(target), source=source)
    skipped = f", {result.skipped} corrupt images skipped" if result.skipped else ""
    print(f"trained {result.steps} steps, {result.seconds:.0f} s in this call{skipped}")
    for name, what in (("samples", "samples"), ("reconstructions", "reconstructions")):
        pictures = sorted((folder / name).glob("*.png"))
        if pictures:
            print(f"  {what}: {pictures[-1]}")
    for name in ("curves.png", "metrics.jsonl", "checkpoints"):
        if (folder / name).exists():
            print(f"  {name.split('.')[0]}: {folder / name}")
    print(f"next: pra sample {folder} --out samples.png")


def sample(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    labels: str = "all",
    seeds: str = "0-7",
    out: Path = Path("samples.png"),
    guidance: float | None = None,
    schedule: GuidanceSchedule | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    temperature: float | None = None,
    batch_size: int = 256,
    raw_weights: bool = False,
    device: str | None = None,
) -> None:
    """Generate one image for each pair of label and seed.

    What is not said is taken from the recipe; the weights are the EMA's.

    Args:
        run: A run's folder, a checkpoint, or a saved model.
        labels: Classes by number or name, such as 0,3 or 2-5 or cat,dog; or all.
        seeds: Seeds, such as 0-15 or 1,2,3. A seed means the same image in every batch.
        out: FILE.png (a grid, labels down, seeds across), FILE.npz (arr_0 uint8 NHWC, arr_1 labels) or DIR/.
        guidance: Guidance scale; 1 is none.
        schedule: Guidance along the raster.
        solver: Integrator of the head.
        steps: Solver intervals per patch.
        temperature: Scale of the noise.
        batch_size: Images generated side by side; no image depends on it.
        raw_weights: Take the raw weights, not their moving average.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
    """
    images.check_output(out)
    sampler = _sampler(run, raw_weights, device, guidance, schedule, solver, steps, temperature)
    chosen = parse_labels(labels, sampler.model.classes)
    numbers = parse_numbers(seeds, "--seeds")
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
    image: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")],
    rows: int,
    label: str | None = None,
    seeds: str = "0-5",
    out: Path = Path("completions.png"),
    guidance: float | None = None,
    schedule: GuidanceSchedule | None = None,
    solver: Solver | None = None,
    steps: int | None = None,
    temperature: float | None = None,
    raw_weights: bool = False,
    device: str | None = None,
) -> None:
    """Continue real images from their first rows of patches.

    A grid shows, per image, the image, what was kept of it, and one continuation per seed.

    Args:
        run: A run's folder, a checkpoint, or a saved model.
        image: Pictures of the model's size and channels.
        rows: Rows of patches to keep; their pixels stay exact.
        label: Class by number or name; by default none.
        seeds: One continuation per seed, such as 0-5.
        out: FILE.png (a grid; the picture alone for one image and one seed), FILE.npz or DIR/ (continuations).
        guidance: Guidance scale; 1 is none.
        schedule: Guidance along the raster.
        solver: Integrator of the head.
        steps: Solver intervals per patch.
        temperature: Scale of the noise.
        raw_weights: Take the raw weights, not their moving average.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
    """
    images.check_output(out)
    if not image:
        raise PraError("no IMAGE given: name at least one picture to complete")
    sampler = _sampler(run, raw_weights, device, guidance, schedule, solver, steps, temperature)
    config = sampler.model.config
    real = torch.stack([_read_picture(path, config.channels, config.image_size) for path in image])
    number = config.null_class if label is None else parse_labels(label, sampler.model.classes)[0]
    numbers = parse_numbers(seeds, "--seeds")
    repeated = real.repeat_interleave(len(numbers), dim=0)
    continued = sampler.complete(repeated, rows, [number] * len(repeated), numbers * len(image)).cpu()
    names = [f"{path.stem}-seed{seed:06d}" for path in image for seed in numbers]
    pictures, columns = continued, len(numbers)
    if out.suffix == ".png" and len(continued) > 1:
        kept = real.clone()
        kept[:, :, rows * config.patch_size :] = 0.0
        groups = continued.view(len(image), columns, *continued.shape[1:])
        pictures = torch.cat([real.unsqueeze(1), kept.unsqueeze(1), groups], dim=1).flatten(0, 1)
        columns += 2
    images.save(pictures, [number] * len(continued), names, columns, out)
    print(f"{len(image)} images continued from {rows} of {config.grid[0]} rows, {len(numbers)} times each: {out}")


def show(name: Annotated[Positional[str], arg(metavar="RECIPE|RUN")] = "", json: bool = False) -> None:
    """Show a recipe or a run: configuration, parameters, arithmetic. Without a name, list the recipes.

    Args:
        name: A recipe, or a run's folder.
        json: Machine-readable.
    """
    if not name:
        for base, build in RECIPES.items():
            print(f"{base:12} {(build.__doc__ or '').strip().splitlines()[0]}")
        return
    config = read_run(Path(name)) if Path(name).is_dir() else recipe(name)
    with torch.device("meta"):
        model = PRA(config.model)
    parts = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
    parameters = {"total": sum(parts.values()), **parts}
    sampling = flops.sampling_flops(config)
    arithmetic = {
        "training": flops.training_flops(config),
        "sampling": {"total": sum(sampling.values()), **sampling},
    }
    report = {"config": to_dict(config), "parameters": parameters, "flops_per_image": arithmetic}
    print(_dump(report) if json else _describe(report))


def parse_numbers(text: str, option: str) -> list[int]:
    """``"0,4-6"`` to ``[0, 4, 5, 6]``.

    Raises:
        PraError: anything else than numbers of at least 0 and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise PraError(f"{option} {text!r}: {part!r} is no number or range; write 0,3 or 0-15")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def parse_labels(text: str, classes: Sequence[str]) -> list[int]:
    """``"all"``, numbers, ranges or class names, mixed, to class numbers.

    Raises:
        PraError: a number out of range, or a name that no class has (the nearest is given).
    """
    if text == "all":
        return list(range(len(classes)))
    labels: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part in classes:
            labels.append(classes.index(part))
        elif part.replace("-", "").isdecimal():
            labels.extend(parse_numbers(part, "label"))
        else:
            raise PraError(f"no class {part!r}{nearest(part, classes)}")
    wrong = [label for label in labels if label >= len(classes)]
    if wrong:
        raise PraError(f"label {wrong[0]} is out of range: this model's classes are 0 to {len(classes) - 1}")
    return labels


def _sampler(
    run: Path,
    raw_weights: bool,
    device: str | None,
    guidance: float | None,
    schedule: GuidanceSchedule | None,
    solver: Solver | None,
    steps: int | None,
    temperature: float | None,
) -> Sampler:
    """The run's model on its device, with its own settings but for those that were given."""
    model = weights.load(run, ema=not raw_weights, device=pick_device(device))
    asked = {
        "guidance": guidance,
        "schedule": schedule,
        "solver": solver,
        "steps": steps,
        "temperature": temperature,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    config: SamplingConfig = dataclasses.replace(model.sampling, **given)
    return Sampler(model, config)


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
    except (OSError, SyntaxError) as error:
        raise PraError(f"{path} cannot be read as a picture: {error}") from None
    if picture.mode in ("1", "P"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    found = len(picture.getbands())
    if picture.size != (size[1], size[0]) or found != channels:
        raise PraError(
            f"{path} is {picture.width}x{picture.height} with {found} channels; this model completes pictures of "
            f"{size[1]}x{size[0]} with {channels}: resize or convert it first"
        )
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return images.from_uint8(pixels.view(*size, channels).permute(2, 0, 1))


def _apply(config: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise PraError(f"--set {setting!r} needs the form KEY=VALUE, such as train.optimizer.lr=1e-4")
        config = override(config, path, value)
    return config


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


def _warn(message: Warning | str, *_: Any) -> None:
    tqdm.write(f"pra: warning: {message}", file=sys.stderr)
