"""The counted cost of sampling, the least time that it takes on a device, and the measured time, part by part."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pra.bench.device import Peak, timed
from pra.config import ModelConfig, Precision, SamplingConfig
from pra.evaluation import flops
from pra.models import PRA
from pra.sampling import Engine, Steps, Token, generate

PLACES = 5
"""Raster positions, from the second to the last, at which a piece of the step is timed."""

REPEATS = 7
"""Of each piece at each position, of which the median counts."""


@dataclass(frozen=True)
class Row:
    """One part at one batch size, for ONE image: FLOPs, bytes, and seconds at least and as measured.

    ``floor`` and ``measured`` are None where nothing is known of a device.
    """

    batch: int
    part: str
    flops: int
    bytes: float
    floor: float | None = None
    measured: float | None = None


def count(
    config: ModelConfig, sampling: SamplingConfig, batches: Sequence[int], element_size: int, peak: Peak | None
) -> list[Row]:
    """Return rows for every batch size: backbone, head, decoder, and the whole image, the sum of theirs."""
    rows = []
    for batch in batches:
        parts = [
            Row(batch, part, cost.flops, cost.bytes, peak.floor(cost.flops, cost.bytes) if peak else None)
            for part, cost in flops.sampling_costs(config, sampling, batch, element_size).items()
        ]
        rows += [*parts, _whole(parts)]
    return rows


def measured(engine: Engine, rows: Sequence[Row]) -> list[Row]:
    """Add the engine's times to the rows of one batch size: means over a few positions along the raster."""
    steps, batch, size = engine.steps, engine.steps.batch, engine.steps.model.config
    device = steps.model.device
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    starts = torch.randn(batch, size.num_patches, size.state_dim, device=device)
    draws = torch.randn(batch, steps.config.steps, size.state_dim, device=device)
    given = draws if steps.config.adds_noise else None
    seconds: dict[str, list[float]] = {}
    with engine.arithmetic():
        token = next(generate(steps, labels, starts, starts.new_empty(batch, 0, size.patch_dim), lambda _: given))
        for position in sorted({1 + step * (size.num_patches - 2) // (PLACES - 1) for step in range(PLACES)}):
            steps.seek(position)
            for part, work in _work(steps, token, position, given).items():
                work()  # warms up, and captures where there are graphs
                runs = [timed(work, device) for _ in range(REPEATS)]
                seconds.setdefault(part, []).append(statistics.median(runs))
    times = {part: size.num_patches * statistics.mean(values) / batch for part, values in seconds.items()}
    parts = [Row(batch, r.part, r.flops, r.bytes, r.floor, times[r.part]) for r in rows if r.part in times]
    return [*parts, _whole(parts)]


def _work(steps: Steps, token: Token, position: int, draws: Tensor | None) -> dict[str, Callable[[], Tensor]]:
    """The work of one token, by the names of the parts; it may be repeated."""
    scale = steps.scale(position)
    return {
        "backbone": lambda: steps.run(steps.read, steps.seen, token.patch),
        "head": lambda: steps.run(steps.integrate, scale is None, token.h, token.state, scale, draws, None),
        "decoder": lambda: steps.run(steps.write, steps.written, token.state),
    }


def _whole(parts: Sequence[Row]) -> Row:
    """The whole image: the sums of its parts."""

    def total(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    flops, traffic = sum(row.flops for row in parts), sum(row.bytes for row in parts)
    floor, measured = total([row.floor for row in parts]), total([row.measured for row in parts])
    return Row(parts[0].batch, "image", flops, traffic, floor, measured)


def bench(
    model: PRA, sampling: SamplingConfig, batches: Sequence[int], precision: Precision, compile: bool, peak: Peak
) -> list[Row]:
    """Return counts, floor and measured time for every batch size, on the model's device."""
    rows: list[Row] = []
    for batch in batches:
        engine = Engine(model, sampling, batch, precision, compile)
        element_size = engine.steps.backbone_cache.keys.element_size()
        rows += measured(engine, count(model.config, sampling, [batch], element_size, peak))
    return rows
