"""``pra bench sample``: thin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from pra.bench.device import Peak, measure
from pra.bench.sampling import Row, bench, count
from pra.commands.options import File, Flag, Number, Settings, Text, parse_numbers
from pra.config import Precision, SamplingConfig, apply_settings, check_sampling, to_dict
from pra.config.checks import member
from pra.errors import PraError
from pra.evaluation.outputs import check_outputs
from pra.models import PRA, build_model, weights
from pra.recipes import recipe
from pra.training.run import write_json
from pra.utils.device import in_bfloat16, pick_device
from pra.utils.provenance import environment

LARGEST_BATCH = 1 << 16


def bench_command(
    run: Annotated[Positional[str], arg(metavar="RUN|RECIPE")],
    *,
    batch: Annotated[str, arg(metavar="TEXT")] = "1,16,256",
    counts: Flag = False,
    compile: Flag = False,
    precision: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "auto",
    tflops: Number = None,
    bandwidth: Number = None,
    device: Text = None,
    out: File = None,
    settings: Settings = (),
) -> None:
    """Count what sampling an image costs, and measure how near to that it comes.

    By part and batch size, for one image: FLOPs, bytes between memory and processor, the time that they take at least
    on this device, and the time measured. A recipe is measured with random weights.

    Args:
        run: A run's folder, a saved model, or a recipe.
        batch: Images side by side, such as 1,16,256.
        counts: Count only; a floor needs --tflops and --bandwidth then.
        compile: Let torch's compiler fuse the step.
        precision: Of matrix products, weights and caches.
        tflops: The device's TFLOP/s of matrix products; by default measured.
        bandwidth: The device's TB/s between memory and processor; by default measured.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        out: Write the same figures as JSON.
        settings: A sampling setting, such as steps=10 or solver=euler; may be repeated.
    """
    out = out and out.expanduser()
    check_outputs(report=out)
    batches = parse_numbers(batch, "--batch")
    if not all(1 <= size <= LARGEST_BATCH for size in batches):
        raise PraError(f"--batch {batch!r}: sizes must lie in [1, {LARGEST_BATCH}]", value=batch)
    arithmetic, given = member(Precision, precision, "--precision"), None
    if tflops is not None and bandwidth is not None and tflops > 0 and bandwidth > 0:
        given = Peak(tflops * 1e12, bandwidth * 1e12)
    elif tflops is not None or bandwidth is not None:
        problem = "--tflops and --bandwidth belong together. Give both, positive, or neither to have them measured"
        raise PraError(problem, code="conflict", tflops=tflops, bandwidth=bandwidth)
    target = torch.device("meta") if counts else pick_device(device)
    model, sampling = _model(run, target, settings)
    dtype = torch.bfloat16 if in_bfloat16(target, arithmetic) else torch.float32
    peak = given if counts else given or measure(target, dtype)
    if counts or peak is None:
        rows = [row for size in batches for row in count(model.config, sampling, size, dtype.itemsize, peak)]
    else:
        rows = bench(model, sampling, batches, arithmetic, compile, peak)
    print(_table(rows, peak, dtype))
    if out is not None:
        values = {"run": run, "sampling": to_dict(sampling), "dtype": str(dtype), "peak": peak and asdict(peak)}
        write_json(out, values | {"rows": [asdict(row) for row in rows], "environment": environment()})
        print(f"figures: {out}")


def _model(name: str, device: torch.device, settings: Sequence[str]) -> tuple[PRA, SamplingConfig]:
    if Path(name).expanduser().is_dir():
        model = weights.load(name).to(device)
        sampling = model.sampling
    else:
        config = recipe(name)
        with device:
            model = build_model(config.model)
        sampling = config.sampling
    if not model.config.autoregressive:
        kind = model.config.name
        raise PraError(
            f"{name} is a {kind}, which makes all patches at once. Use an autoregressive model", code="unsupported"
        )
    sampling = apply_settings(sampling, settings)
    check_sampling(model.config, sampling)
    return model.eval(), sampling


def _table(rows: Sequence[Row], peak: Peak | None, dtype: torch.dtype) -> str:
    lines = [f"{'batch':>6} {'part':<9} {'GFLOPs':>10} {'GB':>9} {'floor ms':>10} {'measured ms':>12} {'of floor':>9}"]
    for row in rows:
        line = f"{row.batch:>6} {row.part:<9} {row.flops / 1e9:>10.4g} {row.bytes / 1e9:>9.4g}"
        if row.floor is not None:
            line += f" {1000 * row.floor:>10.4g}"
        if row.floor is not None and row.measured is not None:
            line += f" {1000 * row.measured:>12.4g} {100 * row.floor / row.measured:>7.0f} %"
        lines.append(line)
    name = str(dtype).removeprefix("torch.")
    bound = f", at {peak.flops / 1e12:.4g} TFLOP/s and {peak.bytes / 1e12:.4g} TB/s" if peak else ""
    return "\n".join([f"one image, {name}{bound}", *lines])
