"""What PRA costs and what it saves: ratios within one run, measured in turn so that a drifting machine cancels out.

    python benchmarks/rollout.py   # fashion, on the best device there is
    python benchmarks/rollout.py --recipe pra-s-256 --batch-size 2 --repeats 3 --no-sampling   # 256 tokens on a CPU

Prints, as medians with the range of the paired ratios:
    one PRA step over one teacher-forced step of the same backbone, encoder without and with h;
    building one batch of inputs with the exact rollout over the parallel one;
    sampling without caches over sampling with them;
    with --compile, one PRA step over the same compiled (on a CPU it needs a C++ compiler, and a minute).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import tyro
from naive import sample_without_caches

from pra import Sampler, noise, recipe, rollout
from pra.config import Clean, Exact, Parallel, RunConfig, SamplingConfig
from pra.device import autocast, pick_device
from pra.models import PRA
from pra.objectives import Losses, training_losses
from pra.provenance import environment
from pra.train.optimizer import build_optimizer

Work = Callable[[], object]


def main(
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe")] = "fashion",
    batch_size: int = 32,
    repeats: int = 7,
    sampling: bool = True,
    compile: bool = False,
    device: str | None = None,
) -> None:
    """Measures and prints; the last line is the same as JSON.

    Args:
        recipe_name: Sizes to measure.
        batch_size: Images per step, per batch of inputs and per batch of samples.
        repeats: Paired measurements, after one warm-up.
        sampling: Measure sampling too; without caches it takes long at 256 tokens.
        compile: Measure the compiled step too.
        device: cpu or cuda.
    """
    target, run = pick_device(device), recipe(recipe_name)
    blind, seeing = (with_encoder(run, sees) for sees in (False, True))
    # Not the recipe of that name, which spends the codec's parameters on a deeper backbone.
    pixel = replace(run, model=replace(run.model, codec=None), train=replace(run.train, rollout=Clean()))
    results = {
        "pra_step_over_teacher_forced": compare(*(step(r, batch_size, target) for r in (blind, pixel)), repeats),
        "pra_step_over_teacher_forced_encoder_sees_h": compare(
            *(step(r, batch_size, target) for r in (seeing, pixel)), repeats
        ),
        "exact_over_parallel_inputs": compare(*inputs(blind, batch_size, target), repeats),
    }
    if sampling:
        both = samplers(blind, batch_size, target)
        results["sampling_without_over_with_caches"] = compare(*both, min(repeats, 3))
    if compile:
        both = (step(blind, batch_size, target, loss) for loss in (training_losses, torch.compile(training_losses)))
        results["step_over_compiled_step"] = compare(*both, repeats)
    for name, result in results.items():
        ratio, low, high = (result[key] for key in ("ratio", "lowest", "highest"))
        print(f"{name:46} {ratio:8.2f}x  ({low:.2f} to {high:.2f}; {result['a_ms']:.1f} / {result['b_ms']:.1f} ms)")
    print(json.dumps({"recipe": recipe_name, "batch_size": batch_size, "results": results, "where": environment()}))


def with_encoder(run: RunConfig, sees_condition: bool) -> RunConfig:
    """The run with an encoder that sees ``h`` or not."""
    assert run.model.codec, "the benchmark needs a recipe with learned states"
    encoder = replace(run.model.codec.encoder, sees_condition=sees_condition)
    return replace(run, model=replace(run.model, codec=replace(run.model.codec, encoder=encoder)))


def scene(
    run: RunConfig, batch_size: int, device: torch.device
) -> tuple[PRA, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model, images, labels and keys; synthetic, since only time is measured."""
    labels = torch.arange(batch_size, device=device) % run.model.num_classes
    images = torch.rand(batch_size, run.model.channels, *run.model.image_size, device=device) * 2 - 1
    return PRA(run.model).to(device), images, labels, noise.keys(0, torch.arange(batch_size, device=device))


def step(run: RunConfig, batch_size: int, device: torch.device, loss: Callable[..., Losses] = training_losses) -> Work:
    """One whole training step, optimiser included."""
    model, images, labels, keys = scene(run, batch_size, device)
    optimizer = build_optimizer(model, run.train.optimizer)

    def work() -> None:
        with autocast(device, run.train.precision):
            losses = loss(model, images, labels, keys, run.train.objective, run.train.rollout)
        torch.autograd.backward(losses.total)
        optimizer.step()
        optimizer.zero_grad()

    return work


def inputs(run: RunConfig, batch_size: int, device: torch.device) -> tuple[Work, Work]:
    """One batch of AR inputs, by the exact and by the parallel rollout."""
    model, images, labels, keys = scene(run, batch_size, device)
    patches = model.patchify(images)
    states = model.codec.encode(patches, None).detach()

    def make(how: Exact | Parallel) -> Work:
        @torch.no_grad()
        def work() -> None:
            with autocast(device, run.train.precision):
                rollout.ar_inputs(how, model, labels, patches, states, keys)

        return work

    return make(Exact()), make(Parallel())


def samplers(run: RunConfig, batch_size: int, device: torch.device) -> tuple[Work, Work]:
    """One batch of guided samples, without and with caches."""
    model, _, labels, _ = scene(run, batch_size, device)
    settings, seeds = SamplingConfig(guidance=2.0, steps=3), list(range(batch_size))
    sampler = Sampler(model, settings)

    def naive() -> None:
        with autocast(device, run.train.precision):
            sample_without_caches(model, settings, labels.tolist(), seeds)

    return naive, lambda: torch.numel(sampler.sample(labels, seeds))


def compare(a: Work, b: Work, repeats: int) -> dict[str, float]:
    """Both in turn; the median of the paired ratios."""
    a(), b()
    pairs = [(milliseconds(a), milliseconds(b)) for _ in range(repeats)]
    ratios = sorted(x / y for x, y in pairs)
    return {
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "a_ms": statistics.median(x for x, _ in pairs),
        "b_ms": statistics.median(y for _, y in pairs),
    }


def milliseconds(work: Work) -> float:
    """Wall time, the device's queue included."""
    synchronise()
    begin = time.perf_counter()
    work()
    synchronise()
    return 1000 * (time.perf_counter() - begin)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    tyro.cli(main)
