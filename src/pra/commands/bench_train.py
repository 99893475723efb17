"""``pra bench train``: thin."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from pra.bench.device import measure
from pra.bench.plan import H200, device_memory, forecast, needs_of, perceptual_flops, perceptual_of
from pra.bench.training import Seconds, measure_step, teacher_forced
from pra.commands.options import File, Flag, Integer, Number, Settings, Text
from pra.config import RunConfig, apply_settings, to_dict
from pra.config.checks import positive
from pra.errors import PraError
from pra.evaluation.flops import training_flops
from pra.evaluation.outputs import check_outputs
from pra.models.weights import read_json
from pra.recipes import recipe_or_run
from pra.training.run import write_json
from pra.utils.device import in_bfloat16, pick_device
from pra.utils.provenance import device_name, environment

STEPS, DEVICES, MFUS = 10, 8, "0.3,0.4,0.5"
GIB, TERA = 2**30, 1e12

Figures = tuple[dict[str, Any], list[tuple[str, str, str]]]
"""Values for JSON, and lines for a person: a name, a number with its unit, and what it is."""


def bench_train_command(
    run: Annotated[Positional[str], arg(metavar="RECIPE|RUN")],
    *,
    steps: Integer = None,
    batch: Integer = None,
    tflops: Number = None,
    plan: Flag = False,
    gpus: Integer = None,
    mfu: Text = None,
    measured: File = None,
    device: Text = None,
    out: File = None,
    settings: Settings = (),
) -> None:
    """Measure a training step on synthetic images, or with --plan compute what a whole training takes.

    Measured on one device, everything in turn: images/s, the FLOP/s achieved and their share of the device's matrix
    products (MFU), memory, the parts of the step, and a teacher-forced step of the same backbone. The plan gives memory
    and, for an MFU, the time; LPIPS counts in both where the recipe has it.

    Args:
        run: A recipe, or a run's folder.
        steps: Rounds that are timed; by default 10.
        batch: Images of a step; by default as many as the recipe takes at a time.
        tflops: The device's TFLOP/s of matrix products; by default measured, and with --plan an H200's.
        plan: Compute, measure nothing.
        gpus: With --plan: how many; by default 8.
        mfu: With --plan: shares of the matrix rate; by default 0.3,0.4,0.5.
        measured: With --plan: what this command has measured of the same model on such a device, its --out; in place of
            --mfu and --tflops.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        out: Write the same figures as JSON.
        settings: Any setting that `pra show RECIPE` lists, such as train.compile=true; may be repeated.
    """
    numbers = {"--tflops": tflops, "--steps": steps, "--batch": batch, "--gpus": gpus}
    for name, value in numbers.items():
        if value is not None:
            positive(value, name)
    unused = {"--steps": steps, "--device": device} if plan else {"--gpus": gpus, "--mfu": mfu, "--measured": measured}
    for name in (name for name, value in unused.items() if value is not None):
        raise PraError(f"{name} has no effect {'with' if plan else 'without'} --plan", code="conflict", option=name)
    out = out and out.expanduser()
    check_outputs(report=out)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise PraError("pra bench train measures one device. Start it without torchrun", code="unsupported")
    config = recipe_or_run(run)
    if batch:  # before the settings, which are checked with it
        config = _batched(config, batch, plan)
    config = apply_settings(config, settings)
    if not batch:
        config = _batched(config, batch, plan)
    if plan:
        values, lines = _planned(config, gpus or DEVICES, *_rates(config, mfu, tflops, measured))
    else:
        values, lines = _measured(config, pick_device(device), steps or STEPS, tflops and tflops * TERA)
    for name, number, what in lines:
        print(f"{name:<24} {number:<20} {what}".rstrip())
    if out is not None:
        write_json(out, {**values, "config": to_dict(config), "environment": environment()})
        print(f"figures: {out}")


def _batched(config: RunConfig, batch: int | None, plan: bool) -> RunConfig:
    """With so many images in a step; as many at a time as the recipe takes, where that divides."""
    train = config.train
    size = batch or (train.batch_size if plan else train.micro_batch_size or train.batch_size)
    micro = None if train.micro_batch_size and size % train.micro_batch_size else train.micro_batch_size
    return replace(config, train=replace(train, batch_size=size, micro_batch_size=micro))


def _rates(
    config: RunConfig, mfu: str | None, tflops: float | None, measured: Path | None
) -> tuple[list[float], float]:
    """The MFUs to compute with, and the rate of matrix products of which they are shares."""
    if measured is None:
        try:
            shares = [float(part) for part in (mfu or MFUS).split(",")]
        except ValueError:
            shares = [0.0]
        if not all(0 < share <= 1 for share in shares):
            raise PraError(f"--mfu {mfu!r}: shares must lie in (0, 1], such as 0.4 or 0.3,0.5", value=mfu)
        return shares, (tflops * TERA if tflops else H200)
    if mfu is not None or tflops is not None:
        option = "--tflops" if mfu is None else "--mfu"
        raise PraError(f"--measured says both. Leave out {option}", code="conflict", option=option)
    path = measured.expanduser()
    figures = read_json(path)
    try:
        share, rate, model = float(figures["mfu"]), float(figures["device_flops"]), figures["config"]["model"]
    except (KeyError, TypeError, ValueError):
        problem = f"--measured {path} is not of pra bench train --out, without --plan. Measure first"
        raise PraError(problem, code="unreadable", path=path) from None
    if model != json.loads(json.dumps(to_dict(config.model))):
        other = figures["config"].get("recipe")
        problem = f"--measured {path} is of another model, {other}. Measure {config.recipe}, or say --mfu"
        raise PraError(problem, code="mismatch", path=path)
    return [share], rate


def _planned(config: RunConfig, gpus: int, mfus: Iterable[float], rate: float) -> Figures:
    needs, batch, steps = needs_of(config), config.train.batch_size, config.train.steps
    memory, forecasts = device_memory(config, needs, gpus), [forecast(config, needs, gpus, rate, mfu) for mfu in mfus]
    micro, count = config.train.micro_batches(gpus)
    states = memory - needs.memory(micro) + needs.state_bytes
    lines = [
        (config.recipe, f"{needs.parameters / 1e6:.1f} M parameters", f"{steps:,} steps of {batch} images"),
        ("arithmetic", *_arithmetic(needs.flops, needs.perceptual_flops)),
        ("each device", f"{batch // gpus} images", f"of a step, {micro} at a time, {count} times"),
        ("memory at least", f"{memory / GIB:.1f} GiB", "of each device:"),
        ("", f"{states / GIB:.1f} GiB", "weights, gradients, AdamW and averages"),
        ("", f"{needs.fixed_bytes / GIB:.1f} GiB", "copies of the weights"),
        ("", f"{micro} x {needs.image_bytes / GIB:.3g} GiB", "activations"),
        ("time", f"{gpus} devices", f"of {rate / TERA:.4g} TFLOP/s, by the share that is counted arithmetic (MFU):"),
    ]
    for row in forecasts:
        days = f"{row['seconds'] / 86400:.3g} days"
        lines.append((f"  MFU {100 * row['mfu']:.0f} %", f"{row['images_per_second']:.4g} images/s", days))
    values = {"needs": asdict(needs), "devices": gpus, "device_flops": rate, "device_memory": memory}
    return {**values, "forecasts": forecasts}, lines


def _measured(config: RunConfig, device: torch.device, rounds: int, rate: float | None) -> Figures:
    batch, extra = config.train.batch_size, perceptual_flops(config)
    flops = training_flops(config) + extra
    lowered = in_bfloat16(device, config.train.precision)
    dtype = torch.bfloat16 if lowered else torch.float32
    before = rate or measure(device, dtype).flops  # before and after: other users of the machine slow it down
    found = measure_step(config, device, rounds, perceptual_of(config, device))
    peak = rate or max(before, measure(device, dtype).flops)
    took = found["step"]["median"]
    speed = batch / took
    ratio = (flops - extra) / training_flops(teacher_forced(config)) if found["ratio"] else None
    values: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "precision": "bfloat16" if lowered else "float32",
        "rounds": rounds,
        "images_per_second": speed,
        "flops_per_image": flops,
        "perceptual_flops_per_image": extra,
        "flops_per_second": flops * speed,
        "flops_over_teacher_forced": ratio,
        "device_flops": peak,
        "mfu": flops * speed / peak,
        "measured": found,
    }
    micro, count = config.train.micro_batches(1)
    how = f"{values['precision']}, compiled" if config.train.compile else values["precision"]
    lines = [
        (
            config.recipe,
            f"{count} x {micro} images",
            f"on {values['device']}, {how}; medians of {rounds} rounds (range)",
        ),
        ("step", *_milliseconds(found["step"])),
        *(
            (f"  {name}", f"{1000 * part:.4g} ms", f"{100 * part / found['step']['median']:.0f} %")
            for name, part in found["parts"].items()
        ),
    ]
    if over := found["ratio"]:
        spread = f"({over['lowest']:.2f} to {over['highest']:.2f}), without LPIPS; {ratio:.2f}x by arithmetic"
        lines += [
            ("teacher-forced step", *_milliseconds(found["teacher_forced"])),
            ("step over that", f"{over['median']:.2f}x", spread),
        ]
    kind = "allocated on the device" if device.type == "cuda" else "of this process"
    share = f"MFU {100 * flops * speed / peak:.0f} % of {peak / TERA:.4g} TFLOP/s"
    return values, [
        *lines,
        ("images", f"{speed:.4g} images/s", ""),
        ("arithmetic", *_arithmetic(flops, extra)),
        ("", f"{flops * speed / TERA:.4g} TFLOP/s", share),
        ("memory", f"{found['memory'] / GIB:.4g} GiB", f"at the highest, {kind}"),
    ]


def _arithmetic(flops: int, lpips: int) -> tuple[str, str]:
    return f"{flops / 1e9:.4g} GFLOPs", "an image" + (f", {lpips / 1e9:.4g} of them LPIPS" if lpips else "")


def _milliseconds(seconds: Seconds) -> tuple[str, str]:
    median, lowest, highest = (1000 * value for value in seconds.values())
    return f"{median:.4g} ms", f"({lowest:.4g} to {highest:.4g})"
