"""The counted cost of sampling, the least time that it takes on a device, and the measured time, part by part."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from pra.bench.device import Peak, timed
from pra.config import ModelConfig, SamplingConfig
from pra.evaluation import flops
from pra.sampling import Engine, generate

PLACES = 5
"""Raster positions, from the second to the last, at which each piece of a step is timed.

Where numbers of solver steps differ along the raster, the head is timed at so many positions of each number.
"""

REPEATS = 7
"""Measurements of each piece at each position; their median counts."""

Row = dict[str, Any]
"""Cost of one ``part`` at one ``batch`` size, for ONE image: ``flops``, ``bytes`` and seconds.

``floor`` are the least seconds that the flops and bytes take, and ``measured`` are measured. Unknown seconds are None.
"""


def count(
    config: ModelConfig,
    sampling: SamplingConfig,
    batch: int,
    element_size: int,
    peak: Peak | None = None,
    seconds: Mapping[str, float] | None = None,
) -> list[Row]:
    """Return rows of the backbone, the head and the decoder, and their sum, the row of the whole image.

    ``seconds`` are from :func:`measured_parts`.
    """
    rows: list[Row] = []
    for part, cost in flops.sampling_costs(config, sampling, batch, element_size).items():
        row = {"batch": batch, "part": part, "flops": cost.flops, "bytes": cost.bytes}
        row["floor"] = max(cost.flops / peak.flops, cost.bytes / peak.bytes) if peak else None
        rows.append(row | {"measured": seconds and seconds[part]})
    image: Row = {"batch": batch, "part": "image"}
    for name in ("flops", "bytes", "floor", "measured"):
        figures = [row[name] for row in rows]
        image[name] = None if None in figures else sum(figures)
    return [*rows, image]


def measured_parts(engine: Engine) -> dict[str, float]:
    """Return the seconds of each part for one image: means over a few positions along the raster."""
    steps, batch, size = engine.steps, engine.steps.batch, engine.steps.model.config
    device = steps.model.device
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    starts = torch.randn(batch, size.num_groups, size.group_state_dim, device=device)
    noise = torch.randn(batch, steps.config.steps, size.group_state_dim, device=device)
    draws = noise if steps.config.adds_noise else None

    def median(*work: Any) -> float:
        steps.run(*work)  # warms up, and captures where there are graphs
        return statistics.median(timed(partial(steps.run, *work), device) for _ in range(REPEATS))

    seconds: dict[str, list[float]] = defaultdict(list)
    head = 0.0
    with engine.arithmetic():
        token = next(generate(steps, labels, starts, starts.new_empty(batch, 0, size.group_dim), lambda _: draws))
        for position in _spread(range(1, size.num_groups)):
            steps.seek(position)
            seconds["backbone"].append(median(steps.read, steps.seen, token.patch))
            seconds["decoder"].append(median(steps.write, steps.written, token.state))
        for at in steps.evaluations.values():
            taken = []
            for position in _spread([place for place in at.places if place] or at.places):
                steps.seek(position)
                scale = steps.scale(position)
                key = at.steps, scale is None
                taken.append(median(steps.integrate, key, token.h, token.state, scale, draws, None))
            head += len(at.places) * statistics.mean(taken) / batch
    each = {part: size.num_groups * statistics.mean(values) / batch for part, values in seconds.items()}
    return {"backbone": each["backbone"], "head": head, "decoder": each["decoder"]}


def _spread(places: Sequence[int]) -> list[int]:
    return sorted({places[step * (len(places) - 1) // (PLACES - 1)] for step in range(PLACES)})
