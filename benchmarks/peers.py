"""Other samplers beside ours, in one run: ratios of time, measured in turn.

    python benchmarks/peers.py                                    # fashion, 2 threads and 1, batches of 1 and 16
    python benchmarks/peers.py --sphere-ar ~/SphereAR             # that repository's generator too
    python benchmarks/peers.py --quality runs/peers               # trains both, and judges them: many minutes

The samplers are the image models of autoregressive-diffusion-pytorch (extra `bench`, benchmarks/ar_diffusion.py), the
generator of SphereAR (benchmarks/sphere_ar.py), and our own plain path and sampler without caches
(benchmarks/engine.py, naive.py). All have the sizes of a recipe, random weights and equally many evaluations of the
head per token. They run in float32, unless a row says bfloat16. Each is compared with our engine in pairs, one run
after the other. The script prints medians and ranges of the pairs' ratios, by the clock and by processor time, which
other processes disturb less. A sampler without classes is compared with ours without guidance, and with guidance.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from ar_diffusion import OWN_MLP_WIDTH, diffusion_model, flow_model
from engine import by_modules
from naive import sample_without_caches
from peers_quality import Point, Ways, measure, needed
from sphere_ar import sphere_ar, tokens_alone

from pra import Sampler, recipe
from pra.commands.options import parse_numbers
from pra.config import GuidanceSchedule, ModelConfig, Precision, SamplingConfig, Solver
from pra.errors import PraError
from pra.models import PRA
from pra.utils.device import pick_device
from pra.utils.provenance import environment, package_version

Work = Callable[[], object]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ratio:
    """Time relative to ours: the median of several measurements, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:6.2f}x ({self.lowest:.2f} to {self.highest:.2f})"


@dataclass(frozen=True)
class Pair:
    """Another library's sampler, and ours to compare with. ``evaluations`` are the other's, per token."""

    name: str
    evaluations: int
    theirs: Work
    ours: Work


def main(
    recipe_name: Annotated[str, tyro.conf.arg(name="recipe")] = "fashion:faithful",
    batch: str = "1,16",
    threads: str = "2,1",
    evaluations: int = 30,
    repeats: int = 9,
    guidance: float = 1.5,
    sphere_ar: Path | None = None,
    compile: bool = False,
    device: str = "cpu",
    quality: Path | None = None,
    steps: int = 1200,
    images: int = 5000,
) -> None:
    """Measures and prints; the last line is the same as JSON.

    Args:
        recipe_name: Recipe that gives the sizes of all models.
        batch: Batch sizes, such as 1,16.
        threads: Threads of the CPU, such as 2,1.
        evaluations: Evaluations of the head per token, even; 30 are autoregressive-diffusion-pytorch's own.
        repeats: Pairs measured, after one run of each to warm up.
        guidance: Our scale where guidance is on.
        sphere_ar: Checkout of SphereAR, to compare it as well.
        compile: Compare our engine compiled with the flow model too, and with SphereAR; takes minutes.
        device: Device to run on, cpu or cuda.
        quality: Folder in which models are trained and judged, in place of all this.
        steps: Steps of each training for --quality.
        images: Images to judge at each number of evaluations.
    """
    counts, sizes = parse_numbers(threads, "--threads"), parse_numbers(batch, "--batch")
    if quality is not None:
        found = equal_quality(*measure(quality, steps, images), counts, sizes, repeats)
    else:
        size = recipe(recipe_name).model
        if not isinstance(size, ModelConfig):
            raise PraError(f"{recipe_name} generates no patch after another; take a recipe that does")
        make = Pairs(size, evaluations, guidance, sphere_ar, compile, pick_device(device))
        rows = [row for count in counts for number in sizes for row in compared(make(number), number, count, repeats)]
        found = {"recipe": recipe_name, "parameters": make.parameters, "results": rows}
    versions = {name: package_version(name) for name in ("autoregressive-diffusion-pytorch", "x-transformers")}
    print(json.dumps(found | {"where": environment() | {"peers": versions}}))


class Pairs:
    """List what is compared at a batch size: every other sampler beside our engine.

    Args:
        size: of all models.
        evaluations: of the head per token, as near to them as each rule comes.
        guidance: our scale where it is on.
        checkout: of SphereAR.
        compile: our engine also compiled, and SphereAR with ours beside it.
        device: of all models.
    """

    def __init__(
        self,
        size: ModelConfig,
        evaluations: int,
        guidance: float,
        checkout: Path | None = None,
        compile: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.evaluations, self.guidance, self.checkout, self.compile = evaluations, guidance, checkout, compile
        self.size, self.device = size, device
        self.model, self.pixels = PRA(size).eval(), PRA(replace(size, codec=None)).eval()
        torch.manual_seed(0)
        self.flow, self.diffusion = flow_model(size, evaluations), diffusion_model(size, evaluations - 1)
        self.wide = flow_model(size, evaluations, OWN_MLP_WIDTH)
        models = {"ours": self.model, "ours, pixels": self.pixels, "flow": self.flow, "wide": self.wide}
        models |= {"diffusion": self.diffusion}
        for model in models.values():
            model.to(device)
        self.parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}

    def __call__(self, batch: int) -> Iterator[Pair]:
        """The pairs, one after the other."""
        plain = SamplingConfig(solver=Solver.MIDPOINT, steps=self.evaluations // 2)
        guided = replace(plain, guidance=self.guidance)
        labels, seeds, count = [0] * batch, list(range(batch)), self.evaluations
        ours, with_guidance = (engine(self.model, config, batch) for config in (plain, guided))
        flow = lambda: self.flow.sample(batch_size=batch)  # noqa: E731
        diffusion = lambda: self.diffusion.sample(batch_size=batch)  # noqa: E731
        yield Pair("flow model", count, flow, ours)
        yield Pair("flow model; ours guided", count, flow, with_guidance)
        yield Pair("flow model; ours on pixels", count, flow, engine(self.pixels, plain, batch))
        in_bfloat16 = engine(self.model, plain, batch, precision=Precision.BFLOAT16)
        yield Pair("flow model; ours in bfloat16", count, flow, in_bfloat16)
        yield Pair("flow model in bfloat16; ours too", count, autocast(flow, self.device), in_bfloat16)
        wide = lambda: self.wide.sample(batch_size=batch)  # noqa: E731
        yield Pair(f"flow model, its head {OWN_MLP_WIDTH} wide", count, wide, ours)
        if self.compile:
            yield Pair("flow model; ours compiled", count, flow, engine(self.model, plain, batch, compile=True))
        yield Pair("diffusion model", count - 1, diffusion, ours)
        yield Pair("our plain path", count, by_modules(engine(self.model, plain, batch)), ours)
        yield Pair("ours without caches", count, lambda: sample_without_caches(self.model, plain, labels, seeds), ours)
        if self.checkout is not None:
            yield from self._sphere_ar(self.checkout, batch)

    def _sphere_ar(self, checkout: Path, batch: int) -> Iterator[Pair]:
        """Compare with SphereAR's own sampler: an SDE solver, with guidance that rises along the raster."""
        config = SamplingConfig(
            guidance=max(self.guidance, 1.01),  # at 1 it would leave the unconditional half out
            schedule=GuidanceSchedule.LINEAR,
            solver=Solver.EULER_MARUYAMA,
            steps=self.evaluations,
        )
        ours = engine(self.model, config, batch, self.compile)
        labels = torch.zeros(batch, dtype=torch.int64, device=self.device)
        for name in ("SphereAR", "SphereAR without its VAE"):
            model: Any = sphere_ar(checkout, self.size, self.compile).to(self.device)
            if name != "SphereAR":
                model = tokens_alone(model)

            def theirs(model: Any = model) -> object:
                return model.sample(labels, sample_steps=self.evaluations - 1, cfg_scale=config.guidance)

            yield Pair(name, self.evaluations, theirs, ours)


def engine(
    model: PRA, config: SamplingConfig, batch: int, compile: bool = False, precision: Precision = Precision.FLOAT32
) -> Work:
    """Our sampler's work for a batch of the first class."""
    sampler = Sampler(model, config, precision=precision, compile=compile)
    return lambda: sampler.sample([0] * batch, range(batch))


def autocast(work: Work, device: torch.device) -> Work:
    """Return the work under torch's autocast to bfloat16."""

    def cast() -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return work()

    return cast


def compared(pairs: Iterator[Pair], batch: int, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for each pair, printed as it comes."""
    torch.set_num_threads(threads)
    print(f"batch {batch}, {threads} {'threads' if threads > 1 else 'thread'}: time over ours, by the clock; processor")
    for pair in pairs:
        clock, processor = in_turn(pair.theirs, pair.ours, repeats)
        print(f"  {pair.name:46} {pair.evaluations:3} evaluations {clock!s:28} {processor}", flush=True)
        row = {"name": pair.name, "evaluations": pair.evaluations, "batch": batch, "threads": threads}
        yield row | {"clock": asdict(clock), "processor": asdict(processor)}


def in_turn(a: Work, b: Work, repeats: int) -> tuple[Ratio, Ratio]:
    """Do both in turn: ``a`` over ``b`` by the clock and by processor time."""
    a(), b()
    pairs = [(taken(a), taken(b)) for _ in range(repeats)]
    by_clock, by_processor = ([x[kind] / y[kind] for x, y in pairs] for kind in (0, 1))
    return _ratio(by_clock), _ratio(by_processor)


def taken(work: Work) -> tuple[float, float]:
    """Seconds by the clock, a GPU's queue included, and of all the processor's threads."""
    wait()
    clock, processor = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - clock, time.process_time() - processor


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratio(values: list[float]) -> Ratio:
    return Ratio(statistics.median(values), min(values), max(values))


def equal_quality(
    points: Sequence[Point], ways: Ways, threads: list[int], batches: list[int], repeats: int
) -> dict[str, Any]:
    """The evaluations that each needs, and the time at them."""
    best = needed(points)
    for name, point in best.items():
        print(f"{name:28} {point.evaluations:3} evaluations, {point.way}: FID {point.fid:.3f}")
    sides = [
        ("theirs, within 5 %", "ours, within 5 %"),
        ("theirs, within 5 %", "ours, no worse than theirs"),
        ("theirs, as it comes", "ours, no worse than theirs"),
    ]

    def pairs(batch: int) -> Iterator[Pair]:
        def work(point: Point) -> Work:
            make = ways(point.way, point.evaluations)
            return lambda: make(batch)

        for theirs, ours in sides:
            if theirs in best and ours in best:
                name = f"{theirs}; {ours}"
                yield Pair(name, best[theirs].evaluations, work(best[theirs]), work(best[ours]))

    rows = [row for count in threads for batch in batches for row in compared(pairs(batch), batch, count, repeats)]
    return {
        "quality": [asdict(point) for point in points],
        "needed": {name: asdict(point) for name, point in best.items()},
        "results": rows,
    }


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except PraError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        sys.exit(2)
