"""``pra bench train``: thin."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from pra.bench.device import measure
from pra.bench.plan import H200, device_memory, forecast, needs_of, perceptual_flops, perceptual_of
from pra.bench.training import Measured, Seconds, measure_step, teacher_forced
from pra.commands.options import File, Flag, Integer, Number, Settings, Text
from pra.config import RunConfig, apply_settings, to_dict
from pra.errors import PraError
from pra.evaluation.flops import training_flops
from pra.evaluation.outputs import check_outputs
from pra.models.weights import read_json
from pra.recipes.named import recipe_or_run
from pra.training.run import write_json
from pra.utils.device import in_bfloat16, pick_device
from pra.utils.distributed import join
from pra.utils.provenance import device_name, environment

STEPS, DEVICES, MFUS = 10, 8, "0.3,0.4,0.5"


def bench_train_command(
    run: Annotated[Positional[str], arg(metavar="RECIPE|RUN")],
    *,
    steps: Integer = None,
    batch: Integer = None,
    micro: Integer = None,
    compile: Flag = False,
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
        micro: Images at a time, which divide the batch.
        compile: Let torch's compiler fuse the step.
        tflops: The device's TFLOP/s of matrix products; by default measured, and with --plan an H200's.
        plan: Compute, measure nothing.
        gpus: With --plan: how many; by default 8.
        mfu: With --plan: shares of the matrix rate; by default 0.3,0.4,0.5.
        measured: With --plan: what this command has measured of the same model on such a device, its --out; in place of
            --mfu and --tflops.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        out: Write the same figures as JSON.
        settings: Any setting that `pra show RECIPE` lists, such as train.precision=float32; may be repeated.
    """
    _check_use(plan, {"--gpus": gpus, "--mfu": mfu, "--measured": measured}, {"--steps": steps, "--device": device})
    _check_positive({"--tflops": tflops, "--steps": steps, "--batch": batch, "--micro": micro, "--gpus": gpus})
    out = out and out.expanduser()
    check_outputs(report=out)
    with join() as world:
        if world.size > 1:
            raise PraError("pra bench train measures one device. Start it without torchrun", code="unsupported")
        config = apply_settings(recipe_or_run(run), [*settings, *(["train.compile=true"] if compile else [])])
        usual = config.train.batch_size if plan else config.train.micro_batch_size or config.train.batch_size
        config = _batched(config, batch or usual, micro)
        if plan:
            mfus, rate = _rates(config, mfu, tflops, measured and measured.expanduser())
            values, text = _planned(config, gpus or DEVICES, mfus, rate)
        else:
            values, text = _measured(config, pick_device(device), steps or STEPS, tflops and tflops * 1e12)
    print(text)
    if out is not None:
        write_json(out, {**values, "config": to_dict(config), "environment": environment()})
        print(f"figures: {out}")


def _check_use(plan: bool, of_plan: dict[str, Any], of_measurement: dict[str, Any]) -> None:
    unused = of_measurement if plan else of_plan
    given = next((name for name, value in unused.items() if value is not None), None)
    if given:
        raise PraError(f"{given} has no effect {'with' if plan else 'without'} --plan", code="conflict", option=given)


def _check_positive(numbers: dict[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise PraError(f"{name} {value:g} must be positive", option=name, value=value)


def _batched(config: RunConfig, batch: int, micro: int | None) -> RunConfig:
    """With so many images in a step; without ``micro`` as many at a time as the recipe takes, where that divides."""
    own = config.train.micro_batch_size
    if micro is None and own is not None and batch % own == 0:
        micro = own
    return replace(config, train=replace(config.train, batch_size=batch, micro_batch_size=micro))


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
        return shares, (tflops or H200 / 1e12) * 1e12
    if mfu is not None or tflops is not None:
        option = "--tflops" if mfu is None else "--mfu"
        raise PraError(f"--measured says both. Leave out {option}", code="conflict", option=option)
    figures = read_json(measured)
    try:
        share, rate, model = float(figures["mfu"]), float(figures["device_flops"]), figures["config"]["model"]
    except (KeyError, TypeError, ValueError):
        problem = f"--measured {measured} is not of pra bench train --out, without --plan. Measure first"
        raise PraError(problem, code="unreadable", path=measured) from None
    if model != json.loads(json.dumps(to_dict(config.model))):
        problem = (
            f"--measured {measured} is of another model, {figures['config'].get('recipe')}. Measure {config.recipe}, "
            "or say --mfu"
        )
        raise PraError(problem, code="mismatch", path=measured)
    return [share], rate


def _planned(config: RunConfig, gpus: int, mfus: list[float], rate: float) -> tuple[dict[str, Any], str]:
    needs, batch, steps = needs_of(config), config.train.batch_size, config.train.steps
    memory, table = device_memory(config, needs, gpus), [forecast(config, needs, gpus, rate, mfu) for mfu in mfus]
    micro, count = config.train.micro_batches(gpus)
    states = memory - needs.memory(micro) + needs.state_bytes
    lines = [
        f"{config.recipe}: {needs.parameters / 1e6:.1f} M parameters, {steps} steps of {batch} images, "
        f"{steps * batch / 1e6:.4g} M in all",
        f"counted      {_arithmetic(needs.flops, needs.perceptual_flops)}, "
        f"{steps * batch * needs.flops:.3g} FLOPs in all",
        f"each device  {batch // gpus} images of a step, {micro} at a time, {count} times",
        f"memory       {memory / 2**30:.1f} GiB at least: {states / 2**30:.1f} weights, gradients, AdamW and averages, "
        f"{needs.fixed_bytes / 2**30:.1f} copies of the weights, "
        f"{micro} x {needs.image_bytes / 2**30:.3g} activations",
        f"time         on {gpus} devices of {rate / 1e12:.4g} TFLOP/s, by the share that is counted arithmetic (MFU):",
        f"{'MFU':>7} {'images/s':>10} {'a device':>10} {'s a step':>10} {'in all':>12}",
    ]
    for row in table:
        share, speed, seconds = row.values()
        unit, size = next(pair for pair in (("days", 86400), ("hours", 3600), ("s", 0)) if seconds >= 2 * pair[1])
        whole = f"{seconds / (size or 1):.3g} {unit}"
        lines.append(f"{100 * share:>5.0f} % {speed:>10.4g} {speed / gpus:>10.4g} {batch / speed:>10.4g} {whole:>12}")
    values = {
        "needs": asdict(needs),
        "devices": gpus,
        "device_flops": rate,
        "device_memory": memory,
        "forecasts": table,
    }
    return values, "\n".join(lines)


def _arithmetic(flops: int, lpips: int) -> str:
    return f"{flops / 1e9:.4g} GFLOPs an image" + (f" ({lpips / 1e9:.4g} of them LPIPS)" if lpips else "")


def _measured(config: RunConfig, device: torch.device, rounds: int, rate: float | None) -> tuple[dict[str, Any], str]:
    extra = perceptual_flops(config)
    flops = training_flops(config) + extra
    lowered = in_bfloat16(device, config.train.precision)
    dtype = torch.bfloat16 if lowered else torch.float32
    before = rate or measure(device, dtype).flops  # before and after: other users of the machine slow it down
    found = measure_step(config, device, rounds, perceptual_of(config, device))
    peak = rate or max(before, measure(device, dtype).flops)
    batch = config.train.batch_size
    achieved = flops * batch / found.step.median
    values = {
        "device": device_name(device),
        "device_type": device.type,
        "precision": "bfloat16" if lowered else "float32",
        "rounds": rounds,
        "images_per_second": batch / found.step.median,
        "flops_per_image": flops,
        "perceptual_flops_per_image": extra,
        "flops_per_second": achieved,
        "flops_over_teacher_forced": (flops - extra) / training_flops(teacher_forced(config)) if found.ratio else None,
        "device_flops": peak,
        "mfu": achieved / peak,
        "measured": asdict(found),
    }
    return values, _table(config, found, values)


def _table(config: RunConfig, found: Measured, values: dict[str, Any]) -> str:
    """The measurement for a person."""
    micro, count = config.train.micro_batches(1)
    how = "compiled, " if config.train.compile else ""
    lines = [
        f"{config.recipe} on {values['device']}, {values['precision']}, {how}{count} x {micro} images a step; "
        f"medians of {values['rounds']} rounds (range)",
        f"{'step':<24} {_milliseconds(found.step)}   {values['images_per_second']:.4g} images/s",
    ]
    for name, seconds in found.parts.items():
        lines.append(f"  {name:<22} {1000 * seconds:>9.4g} ms   {100 * seconds / found.step.median:.0f} %")
    if found.ratio is not None and found.teacher_forced is not None:
        ratio, without = found.ratio, " (without LPIPS)" if "LPIPS" in found.parts else ""
        lines += [
            f"{'teacher-forced step':<24} {_milliseconds(found.teacher_forced)}   of the same backbone",
            f"{'step over that':<24} {ratio.median:>9.2f}x ({ratio.lowest:.2f} to {ratio.highest:.2f}){without}; "
            f"{values['flops_over_teacher_forced']:.2f}x by counted arithmetic",
        ]
    kind = "allocated on the device" if values["device_type"] == "cuda" else "of this process"
    lines += [
        f"{'arithmetic':<24} {_arithmetic(values['flops_per_image'], values['perceptual_flops_per_image'])}, "
        f"{values['flops_per_second'] / 1e12:.4g} TFLOP/s: MFU {100 * values['mfu']:.0f} % of "
        f"{values['device_flops'] / 1e12:.4g} TFLOP/s",
        f"{'memory':<24} {found.memory / 2**30:>9.4g} GiB at the highest, {kind}",
    ]
    return "\n".join(lines)


def _milliseconds(seconds: Seconds) -> str:
    return f"{1000 * seconds.median:>9.4g} ms ({1000 * seconds.lowest:.4g} to {1000 * seconds.highest:.4g})"
