"""The counted cost of sampling, the least time that it takes on a device, and the measured time, part by part."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch

from pra.bench.device import Peak, timed
from pra.config import ModelConfig, Precision, SamplingConfig
from pra.evaluation import flops
from pra.models import PRA
from pra.sampling import Engine, generate

PLACES = 5
"""Raster positions, from the second to the last, at which a piece of the step is timed."""

REPEATS = 7
"""Of each piece at each position, of which the median counts."""


@dataclass(frozen=True)
class Row:
    """One part at one batch size, for ONE image: FLOPs, bytes, and seconds at least and as measured, where known."""

    batch: int
    part: str
    flops: int
    bytes: float
    floor: float | None = None
    measured: float | None = None


def count(
    config: ModelConfig,
    sampling: SamplingConfig,
    batch: int,
    element_size: int,
    peak: Peak | None = None,
    seconds: Mapping[str, float] | None = None,
) -> list[Row]:
    """Return rows of the backbone, the head, the decoder, and the whole image, the sum of theirs.

    ``seconds`` are measured, for one image by part.
    """
    rows = []
    for part, cost in flops.sampling_costs(config, sampling, batch, element_size).items():
        floor = peak.floor(cost.flops, cost.bytes) if peak else None
        rows.append(Row(batch, part, cost.flops, cost.bytes, floor, seconds[part] if seconds else None))
    columns: Any = zip(*(astuple(row)[2:] for row in rows), strict=True)
    whole: list[Any] = [None if None in column else sum(column) for column in columns]
    return [*rows, Row(batch, "image", *whole)]


def measured(engine: Engine) -> dict[str, float]:
    """Return the seconds of each part for one image: means over a few positions along the raster."""
    steps, batch, size = engine.steps, engine.steps.batch, engine.steps.model.config
    device = steps.model.device
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    starts = torch.randn(batch, size.num_patches, size.state_dim, device=device)
    draws = torch.randn(batch, steps.config.steps, size.state_dim, device=device)
    given = draws if steps.config.adds_noise else None
    seconds: dict[str, list[float]] = defaultdict(list)
    with engine.arithmetic():
        token = next(generate(steps, labels, starts, starts.new_empty(batch, 0, size.patch_dim), lambda _: given))
        for position in sorted({1 + step * (size.num_patches - 2) // (PLACES - 1) for step in range(PLACES)}):
            steps.seek(position)
            scale = steps.scale(position)
            works: dict[str, tuple[Any, ...]] = {
                "backbone": (steps.read, steps.seen, token.patch),
                "head": (steps.integrate, scale is None, token.h, token.state, scale, given, None),
                "decoder": (steps.write, steps.written, token.state),
            }
            for part, work in works.items():
                steps.run(*work)  # warms up, and captures where there are graphs
                runs = [timed(partial(steps.run, *work), device) for _ in range(REPEATS)]
                seconds[part].append(statistics.median(runs))
    return {part: size.num_patches * statistics.mean(values) / batch for part, values in seconds.items()}


def bench(
    model: PRA, sampling: SamplingConfig, batches: Sequence[int], precision: Precision, compile: bool, peak: Peak
) -> list[Row]:
    """Return counts, floor and measured time for every batch size, on the model's device."""
    rows: list[Row] = []
    for batch in batches:
        engine = Engine(model, sampling, batch, precision, compile)
        element_size = engine.steps.backbone_cache.keys.element_size()
        rows += count(model.config, sampling, batch, element_size, peak, measured(engine))
    return rows
