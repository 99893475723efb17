"""The cost of the exact rollout over the parallel one: the inputs of one batch, made either way in turn.

    python benchmarks/rollout.py   # fashion, on the best device
    python benchmarks/rollout.py --recipe pra-s-256 --batch-size 2 --repeats 3   # 256 tokens on a CPU

Prints the median of the paired ratios with their range. (A step of PRA over a teacher-forced one, and a compiled step:
``pra bench train``. Sampling without caches: ``benchmarks/engine.py --naive``.)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import tyro

from pra import recipe
from pra.bench.device import timed
from pra.config import Exact, ModelConfig, Parallel, RunConfig
from pra.method import noise, rollout
from pra.models import PRA
from pra.utils.device import autocast, pick_device
from pra.utils.provenance import environment

Work = Callable[[], object]


def main(
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe")] = "fashion:faithful",
    batch_size: int = 32,
    repeats: int = 7,
    device: str | None = None,
) -> None:
    """Measures and prints; the last line is the same as JSON.

    Args:
        recipe_name: Sizes to measure.
        batch_size: Images per batch of inputs.
        repeats: Paired measurements, after one warm-up.
        device: cpu or cuda.
    """
    target = pick_device(device)
    works = inputs(recipe(recipe_name), batch_size, target)
    found = compare(*works, repeats, lambda work: timed(work, target))
    ratio, low, high = (found[key] for key in ("ratio", "lowest", "highest"))
    milliseconds = f"{found['a_ms']:.1f} / {found['b_ms']:.1f} ms"
    print(f"exact over parallel inputs {ratio:8.2f}x  ({low:.2f} to {high:.2f}; {milliseconds})")
    print(json.dumps({"recipe": recipe_name, "batch_size": batch_size, "results": found, "where": environment()}))


def inputs(run: RunConfig, batch_size: int, device: torch.device) -> tuple[Work, Work]:
    """One batch of AR inputs, by the exact and by the parallel rollout."""
    assert isinstance(run.model, ModelConfig), "JiT has no rollout"
    assert run.model.codec, "the benchmark needs a recipe with learned states"
    labels = torch.arange(batch_size, device=device) % run.model.num_classes
    images = torch.rand(batch_size, run.model.channels, *run.model.image_size, device=device) * 2 - 1
    keys = noise.keys(0, torch.arange(batch_size, device=device))
    model = PRA(run.model).to(device)
    with torch.no_grad():
        patches = model.patchify(images)
        states = model.codec.encode(patches, model.clean_conditions(labels, patches))

    def make(how: Exact | Parallel) -> Work:
        @torch.no_grad()
        def work() -> None:
            with autocast(device, run.train.precision):
                rollout.ar_inputs(how, model, labels, patches, states, keys)

        return work

    return make(Exact()), make(Parallel())


def compare(a: Work, b: Work, repeats: int, seconds: Callable[[Work], float]) -> dict[str, float]:
    """Measure both in turn by ``seconds``; return the median of the paired ratios."""
    a(), b()
    pairs = [(1000 * seconds(a), 1000 * seconds(b)) for _ in range(repeats)]
    ratios = sorted(x / y for x, y in pairs)
    return {
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "a_ms": statistics.median(x for x, _ in pairs),
        "b_ms": statistics.median(y for _, y in pairs),
    }


if __name__ == "__main__":
    tyro.cli(main)
