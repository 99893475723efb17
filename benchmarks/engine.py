"""The sampler's gain over the model's own modules run plainly: ratios within one run, measured in turn.

    python benchmarks/engine.py --batch 1,64                        # fashion, on the best device
    python benchmarks/engine.py --recipe pra-s-256 --image-size 32  # fewer tokens, for a CPU
    python benchmarks/engine.py --compile                           # torch's compiler in every way; some minutes

The plain path runs the model's own modules with caches, one operation after another; the naive one
(benchmarks/naive.py) has no caches; on a CPU the sampler uses arithmetic compiled for it, on a GPU CUDA graphs, with
--compile also of compiled steps. All make the same images. Prints, for each batch size, how many tensor operations the
plain path and the sampler dispatch for a batch, and the time of the other ways over the sampler's in float32, as
medians of paired ratios with their range: clock time on a GPU, processor time on a CPU, which other processes disturb
less.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any
from unittest.mock import patch

import torch
import tyro
from ahead_of_time import sampler_ahead_of_time
from naive import sample_without_caches
from rollout import compare
from torch.utils._python_dispatch import TorchDispatchMode

from pra import Sampler, recipe
from pra.bench.device import timed
from pra.commands.options import parse_numbers
from pra.config import Precision, SamplingConfig, apply_settings
from pra.models import PRA
from pra.sampling import runner
from pra.sampling.algorithm import run_plainly
from pra.sampling.native import SWITCH
from pra.utils.device import pick_device
from pra.utils.provenance import environment

Work = Callable[[], object]

WITH = {
    "": {},
    ", freezing": {"freezing": True},
    ", cpp_wrapper": {"cpp_wrapper": True},
    ", both": {"freezing": True, "cpp_wrapper": True},
}
"""Settings of torch's compiler, by what the table calls them."""


def main(
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe")] = "fashion:faithful",
    batch: str = "1,64",
    repeats: int = 7,
    image_size: int | None = None,
    naive: bool = False,
    compile: bool = False,
    compile_default: bool = False,
    bfloat16: bool = False,
    threads: int | None = None,
    device: str | None = None,
    settings: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")] = (),
) -> None:
    """Measures and prints; the last line is the same as JSON.

    Args:
        recipe_name: a recipe, whose own sampling settings are taken.
        batch: images side by side, such as 1,64.
        repeats: pairs measured.
        image_size: side of the images, in place of the recipe's: fewer tokens.
        naive: also without caches.
        compile: also by torch's compiler, with its settings for the CPU, and by AOTInductor; takes minutes.
        compile_default: also by torch's compiler with its default settings alone.
        bfloat16: also the engine in bfloat16.
        threads: of the CPU, in place of torch's own choice.
        device: where to run.
        settings: sampling settings, such as steps=10.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    run, target = recipe(recipe_name), pick_device(device)
    size = run.model if image_size is None else replace(run.model, image_size=(image_size, image_size))
    sampling = apply_settings(run.sampling, settings)
    model = PRA(size).to(target).eval()
    found: list[dict[str, Any]] = []
    for count in parse_numbers(batch, "--batch"):
        labels, seeds = [0] * count, list(range(count))

        def engine(precision: Precision = Precision.FLOAT32, compile: bool = False) -> Work:
            sampler = Sampler(model, sampling, precision, compile)
            return lambda: sampler.sample(labels, seeds)  # noqa: B023  called before the next round

        def other(sample: Callable[..., object]) -> Work:
            return lambda: sample(model, sampling, labels, seeds)  # noqa: B023

        ways = {"plain path": by_modules(engine())}
        ways |= {"without caches": other(sample_without_caches)} if naive else {}
        ways |= {"engine, bfloat16": engine(Precision.BFLOAT16)} if bfloat16 else {}
        options_of = WITH if compile else {"": {}} if compile_default else {}
        ways |= {f"compiled{name}": inductor(engine(compile=True), **how) for name, how in options_of.items()}
        if compile:
            ways |= {"ahead of time": ahead_of_time(model, sampling, count)}
        base = engine()
        counts = [operations(work) for work in (ways["plain path"], base)]
        print(f"batch {count}: operations by the plain path, the engine: {counts}")
        for name, work in ways.items():
            ratios = compare(work, base, repeats, lambda done: cost(done, target))
            found.append(ratios | {"batch": count, "name": name, "operations": counts})
            print(
                f"  {name:18} takes {ratios['ratio']:6.2f}x as long as the engine "
                f"({ratios['lowest']:.2f} to {ratios['highest']:.2f}; {ratios['a_ms']:.1f} / {ratios['b_ms']:.1f} ms)"
            )
    print(json.dumps({"recipe": recipe_name, "image_size": size.image_size, "results": found, "where": environment()}))


def by_modules(work: Work) -> Work:
    """A sampler's work by the model's own modules, without CUDA graphs; how it works is decided at its first batch."""

    def done() -> object:
        plainly = patch.object(runner, "runner", lambda device, compile: run_plainly)
        with patch.dict(os.environ, {SWITCH: "0"}), plainly:
            return work()

    return done


def inductor(work: Work, **options: bool) -> Work:
    """Compiled work, compiled at its first call with settings of torch's compiler."""
    first = iter([True])

    def done() -> object:
        if next(first, False):
            torch._dynamo.reset()  # the same functions, compiled with other settings, would serve
        with torch._inductor.config.patch(options):
            return work()

    return done


def ahead_of_time(model: PRA, sampling: SamplingConfig, batch: int) -> Work:
    """A sampler's work by AOTInductor."""
    sampler = sampler_ahead_of_time(model, sampling, batch)
    return lambda: sampler.sample([0] * batch, range(batch))


def cost(work: Work, device: torch.device) -> float:
    """Seconds of the device."""
    if device.type != "cpu":
        return timed(work, device)
    begin = time.process_time()
    work()
    return time.process_time() - begin


def operations(work: Work) -> int:
    """Tensor operations that reach the dispatcher, views included."""

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    work()
    with Counter() as counter:
        work()
    return counter.calls


if __name__ == "__main__":
    tyro.cli(main)
