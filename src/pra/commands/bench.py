"""The commands ``pra bench sample`` and ``pra bench train``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from pra.bench import training
from pra.bench.device import Peak, measure
from pra.bench.sampling import Row, count, measured_parts
from pra.commands.options import Device, File, Flag, Integer, Number, Settings, Text, choices, parse_numbers
from pra.config import Precision, RunConfig, SamplingConfig, apply_settings, check_sampling, to_dict
from pra.config.checks import PositiveFloat, member, positive
from pra.errors import PraError
from pra.evaluation.flops import training_flops
from pra.evaluation.outputs import check_outputs
from pra.models import PRA, build_model, weights
from pra.recipes import recipe, recipe_or_run
from pra.sampling import Engine
from pra.training.run import write_json
from pra.utils.device import in_bfloat16, pick_device
from pra.utils.files import check_fields, read_json
from pra.utils.provenance import device_name, environment

LARGEST_BATCH = 1 << 16
STEPS, DEVICES, MFUS = 10, 8, "0.3,0.4,0.5"
GIGA, GIB, TERA = 1e9, 2**30, 1e12
H200 = 790 * TERA
"""FLOP/s of large bfloat16 matrix products on an NVIDIA H200, as measured (docs/performance.md)."""


def bench_command(
    run: Annotated[Positional[str], arg(metavar="RUN|RECIPE")],
    *,
    batch: Annotated[str, arg(metavar="TEXT")] = "1,16,256",
    counts: Flag = False,
    compile: Flag = False,
    precision: Annotated[str, choices(Precision, "(default: auto)")] = "auto",
    tflops: Number = None,
    bandwidth: Number = None,
    device: Device = None,
    out: File = None,
    settings: Settings = (),
) -> None:
    """Count what sampling an image costs, and measure how close this device comes.

    By part and batch size, for one image: FLOPs, bytes between memory and processor, their least time on this device,
    and the time measured. A recipe is measured with random weights.

    Args:
        run: A run's folder, a saved model, or a recipe.
        batch: Images side by side, such as 1,16,256.
        counts: Count only; the floor then needs --tflops and --bandwidth.
        compile: Let torch's compiler fuse the step.
        precision: Precision of matrix products, weights and caches.
        tflops: The device's TFLOP/s of matrix products; by default measured.
        bandwidth: The device's TB/s between memory and processor; by default measured.
        out: Write the same figures as JSON.
        settings: A sampling setting, such as steps=10 or solver=euler; may be repeated.
    """
    out = _begun(out, {"--tflops": tflops, "--bandwidth": bandwidth})
    sizes, arithmetic = parse_numbers(batch, "--batch"), member(Precision, precision, "--precision")
    if not all(1 <= size <= LARGEST_BATCH for size in sizes):
        raise PraError(f"--batch {batch!r}: sizes must lie in [1, {LARGEST_BATCH}]", value=batch)
    if (tflops is None) != (bandwidth is None):
        problem = "--tflops and --bandwidth belong together. Give both, or neither to measure them"
        raise PraError(problem, code="conflict", tflops=tflops, bandwidth=bandwidth)
    target = torch.device("meta") if counts else pick_device(device)
    model, sampling = _model(run, target, settings)
    dtype = torch.bfloat16 if in_bfloat16(target, arithmetic) else torch.float32
    peak = Peak(tflops * TERA, bandwidth * TERA) if tflops and bandwidth else None
    if not counts:
        peak = peak or measure(target, dtype)
    rows: list[Row] = []
    for size in sizes:
        seconds, element_size = None, dtype.itemsize
        if not counts:
            engine = Engine(model, sampling, size, arithmetic, compile)
            seconds, element_size = measured_parts(engine), engine.steps.backbone_cache.keys.element_size()
        rows += count(model.config, sampling, size, element_size, peak, seconds)
    _print_table(rows, peak, dtype)
    known = {"run": run, "sampling": to_dict(sampling), "dtype": str(dtype), "peak": peak and peak._asdict()}
    _finish(out, known | {"rows": rows})


def _model(name: str, device: torch.device, settings: tuple[str, ...]) -> tuple[PRA, SamplingConfig]:
    if Path(name).expanduser().is_dir():
        model = weights.load(name, device=device)
        sampling = model.sampling
    else:
        config = recipe(name)
        with device:
            model = build_model(config.model).eval()
        sampling = config.sampling
    if not model.config.autoregressive:
        problem = f"{name} is a {model.config.name}, which makes all patches at once. Use an autoregressive model"
        raise PraError(problem, code="unsupported")
    sampling = apply_settings(sampling, settings)
    check_sampling(model.config, sampling)
    return model, sampling


def _print_table(rows: list[Row], peak: Peak | None, dtype: torch.dtype) -> None:
    bound = f", at {peak.flops / TERA:.4g} TFLOP/s and {peak.bytes / TERA:.4g} TB/s" if peak else ""
    print(f"one image, {str(dtype).removeprefix('torch.')}{bound}")
    print(f"{'batch':>6} {'part':<9} {'GFLOPs':>10} {'GB':>9} {'floor ms':>10} {'measured ms':>12} {'of floor':>9}")
    for row in rows:
        line = f"{row['batch']:>6} {row['part']:<9} {row['flops'] / GIGA:>10.4g} {row['bytes'] / GIGA:>9.4g}"
        if row["floor"] is not None:
            line += f" {1000 * row['floor']:>10.4g}"
        if row["measured"] is not None:
            line += f" {1000 * row['measured']:>12.4g} {100 * row['floor'] / row['measured']:>7.0f} %"
        print(line)


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
    device: Device = None,
    out: File = None,
    settings: Settings = (),
) -> None:
    """Measure a training step on synthetic images, or with --plan compute what a whole training takes.

    Measures on one device, in turn: images/s, FLOP/s and their share of the device's matrix products (MFU), memory, the
    parts of the step, and a teacher-forced step of the same backbone. The plan gives memory and, for an MFU, the time.
    LPIPS counts in both if the recipe has it.

    Args:
        run: A recipe, or a run's folder.
        steps: Timed rounds; by default 10.
        batch: Images of a step; by default the recipe's micro-batch.
        tflops: The device's TFLOP/s of matrix products; by default measured, and with --plan an H200's.
        plan: Compute only, without measuring.
        gpus: With --plan: number of GPUs; by default 8.
        mfu: With --plan: shares of the matrix rate; by default 0.3,0.4,0.5.
        measured: With --plan: the --out file of this command for the same model on such a device, in place of --mfu and
            --tflops.
        out: Write the same figures as JSON.
        settings: Any setting that `pra show RECIPE` lists, such as train.compile=true; may be repeated.
    """
    out = _begun(out, {"--tflops": tflops, "--steps": steps, "--batch": batch, "--gpus": gpus})
    unused = {"--steps": steps, "--device": device} if plan else {"--gpus": gpus, "--mfu": mfu, "--measured": measured}
    for name in (name for name, value in unused.items() if value is not None):
        raise PraError(f"{name} has no effect {'with' if plan else 'without'} --plan", code="conflict", option=name)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise PraError("pra bench train measures one device. Start it without torchrun", code="unsupported")
    config = recipe_or_run(run)
    micro = config.train.micro_batch_size
    if batch:  # before the settings, which are checked with it; as many at a time as the recipe takes, if that divides
        micro = None if micro and batch % micro else micro
        config = replace(config, train=replace(config.train, batch_size=batch, micro_batch_size=micro))
    config = apply_settings(config, settings)
    if not batch and not plan and config.train.micro_batch_size:
        config = replace(config, train=replace(config.train, batch_size=config.train.micro_batch_size))
    if plan:
        values = _planned(config, gpus or DEVICES, *_rates(config, mfu, tflops, measured))
    else:
        values = _measured(config, pick_device(device), steps or STEPS, tflops and tflops * TERA)
    _finish(out, values | {"config": to_dict(config)})


def _rates(
    config: RunConfig, mfu: str | None, tflops: float | None, measured: Path | None
) -> tuple[list[float], float]:
    """Return the MFUs to compute with, and the rate of matrix products that they are shares of."""
    if measured is None:
        try:
            shares = [float(part) for part in (mfu or MFUS).split(",")]
        except ValueError:
            shares = [0.0]
        if not all(0 < share <= 1 for share in shares):
            raise PraError(f"--mfu {mfu!r}: shares must lie in (0, 1], such as 0.4 or 0.3,0.5", value=mfu)
        return shares, (tflops * TERA if tflops else H200)
    for option, value in (("--mfu", mfu), ("--tflops", tflops)):
        if value is not None:
            raise PraError(f"--measured holds both. Leave out {option}", code="conflict", option=option)
    path = measured.expanduser()
    figures = read_json(path, finite=True)
    try:
        check_fields(figures, path, mfu=PositiveFloat, device_flops=PositiveFloat, config=dict)
    except PraError:
        problem = f"--measured {path} was not written by pra bench train --out without --plan. Measure first"
        raise PraError(problem, code="unreadable", path=path) from None
    if figures["config"].get("model") != json.loads(json.dumps(to_dict(config.model))):
        problem = f"--measured {path} is of another model, {figures['config'].get('recipe')}"
        raise PraError(f"{problem}. Measure {config.recipe}, or use --mfu", code="mismatch", path=path)
    return [figures["mfu"]], figures["device_flops"]


def _planned(config: RunConfig, gpus: int, mfus: list[float], rate: float) -> dict[str, Any]:
    needs, batch, steps = training.needs_of(config), config.train.batch_size, config.train.steps
    states, (micro, count) = training.device_states(config, needs, gpus), config.train.micro_batches(gpus)
    memory = states + needs.fixed_bytes + micro * needs.image_bytes
    _say(config.recipe, f"{needs.parameters / 1e6:.1f} M parameters", f"{steps:,} steps of {batch} images")
    _say("arithmetic", *_arithmetic(needs.flops, needs.perceptual_flops))
    _say("each device", f"{batch // gpus} images", f"of a step, {micro} at a time, {count} times")
    _say("memory at least", f"{memory / GIB:.1f} GiB", "of each device:")
    _say("", f"{states / GIB:.1f} GiB", "weights, gradients, AdamW and averages")
    _say("", f"{needs.fixed_bytes / GIB:.1f} GiB", "copies of the weights")
    _say("", f"{micro} x {needs.image_bytes / GIB:.3g} GiB", "activations")
    counted = "by the share that is counted arithmetic (MFU):"
    _say("time", f"{gpus} devices", f"of {rate / TERA:.4g} TFLOP/s, {counted}")
    forecasts = []
    for mfu in mfus:
        speed = gpus * mfu * rate / needs.flops
        seconds = steps * batch / speed
        forecasts.append({"mfu": mfu, "images_per_second": speed, "seconds": seconds})
        _say(f"  MFU {100 * mfu:.0f} %", f"{speed:.4g} images/s", f"{seconds / 86400:.3g} days")
    values = {"needs": asdict(needs), "devices": gpus, "device_flops": rate, "device_memory": memory}
    return values | {"forecasts": forecasts}


def _measured(config: RunConfig, device: torch.device, rounds: int, rate: float | None) -> dict[str, Any]:
    extra, lowered = training.perceptual_flops(config), in_bfloat16(device, config.train.precision)
    plain, dtype = training_flops(config), torch.bfloat16 if lowered else torch.float32
    before = rate or measure(device, dtype).flops  # before and after: other users of the machine slow it down
    found = training.measure_step(config, device, rounds, training.perceptual_of(config, device))
    peak = rate or max(before, measure(device, dtype).flops)
    took, over = found["step"]["median"], found["ratio"]
    flops, speed = plain + extra, config.train.batch_size / took
    values: dict[str, Any] = {
        "device": device_name(device),
        "precision": "bfloat16" if lowered else "float32",
        "rounds": rounds,
        "images_per_second": speed,
        "flops_per_image": flops,
        "perceptual_flops_per_image": extra,
        "flops_per_second": flops * speed,
        "flops_over_teacher_forced": plain / training_flops(training.teacher_forced(config)) if over else None,
        "device_flops": peak,
        "mfu": flops * speed / peak,
        "measured": found,
    }
    micro, count = config.train.micro_batches(1)
    how = f"{values['precision']}{', compiled' if config.train.compile else ''}; medians of {rounds} rounds (range)"
    _say(config.recipe, f"{count} x {micro} images", f"on {values['device']}, {how}")
    _say("step", *_milliseconds(found["step"]))
    for part, seconds in found["parts"].items():
        _say(f"  {part}", f"{1000 * seconds:.4g} ms", f"{100 * seconds / took:.0f} %")
    if over:
        counted = f"without LPIPS; {values['flops_over_teacher_forced']:.2f}x by arithmetic"
        _say("teacher-forced step", *_milliseconds(found["teacher_forced"]))
        _say("step over that", f"{over['median']:.2f}x", f"({over['lowest']:.2f} to {over['highest']:.2f}), {counted}")
    _say("images", f"{speed:.4g} images/s")
    _say("arithmetic", *_arithmetic(flops, extra))
    share = f"MFU {100 * values['mfu']:.0f} % of {peak / TERA:.4g} TFLOP/s"
    _say("", f"{values['flops_per_second'] / TERA:.4g} TFLOP/s", share)
    kind = "allocated on the device" if device.type == "cuda" else "of this process"
    _say("memory", f"{found['memory'] / GIB:.4g} GiB", f"at the highest, {kind}")
    return values


def _say(name: str, number: str, what: str = "") -> None:
    print(f"{name:<24} {number:<20} {what}".rstrip())


def _arithmetic(flops: int, lpips: int) -> tuple[str, str]:
    return f"{flops / GIGA:.4g} GFLOPs", "an image" + (f", {lpips / GIGA:.4g} of them LPIPS" if lpips else "")


def _milliseconds(seconds: training.Seconds) -> tuple[str, str]:
    median, lowest, highest = (1000 * value for value in seconds.values())
    return f"{median:.4g} ms", f"({lowest:.4g} to {highest:.4g})"


def _begun(out: Path | None, numbers: dict[str, float | None]) -> Path | None:
    """Check the file to write and the numbers given."""
    for name, value in numbers.items():
        if value is not None:
            positive(value, name)
    out = out and out.expanduser()
    check_outputs(report=out)
    return out


def _finish(out: Path | None, figures: dict[str, Any]) -> None:
    if out is not None:
        write_json(out, figures | {"environment": environment()})
        print(f"figures: {out}")
