"""The study `probe` as a table and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from studies.measures import Row
from studies.names import in_ranges, look_of, name_of
from studies.plot_parts import ON_TOP, ranking, room_beside

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Probed:
    """One way of reading a system over its seeds: a layer, a pooling, and JiT's time, if they apply.

    ``top1`` on the held-out set and ``validation``, one per seed.
    """

    layer: int | None
    pooling: str | None
    time: float | None
    top1: list[float]
    validation: list[float]

    @property
    def mean(self) -> float:
        """The mean of ``top1``."""
        return statistics.mean(self.top1)


def about_probe(rows: list[Row]) -> str:
    """Return the line above the table: how the figures were measured."""
    images, held_out = rows[0]["images"], rows[0]["held_out"]
    return (
        f"Top-1 accuracy on {held_out} held-out images of a logistic regression fitted to {images} training images; "
        "L2, layer, pooling and JiT's time by a tenth of the latter"
    )


def probe_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: a system each, at the layer, pooling and time that validation chooses on the seeds' mean."""
    lines = []
    for name, ways in by_name(rows).items():
        best = chosen(ways)
        spread = statistics.stdev(best.top1) if len(best.top1) > 1 else None
        top1 = f"{100 * best.mean:.1f} %" + (f" ± {100 * spread:.1f}" if spread is not None else "")
        where = [_cell(best.layer), _cell(best.pooling), _cell(best.time)]
        # Both poolings together are twice as many numbers.
        means = [way for way in ways if way.pooling == "mean"]
        plain = f"{100 * chosen(means).mean:.1f} %" if means else "-"
        seeds = in_ranges(row["seed"] for row in rows if named(row) == name)
        lines.append((best.mean, [name, top1, *where, plain, seeds]))
    head = ["features", "top-1", "layer", "pooling", "time", "top-1 of the mean token alone", "seeds"]
    return head, [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def draw_probe(figure: Figure, rows: list[Row]) -> None:
    """Plot each system at what validation chooses on the left, and the mean token of each layer on the right."""
    left, right = figure.subplots(1, 2)
    ways = by_name(rows)
    order = sorted(ways, key=lambda name: -chosen(ways[name]).mean)
    looks = {named(row): look_of(row["system"], row.get("value")) for row in rows}
    best = {name: chosen(ways[name]) for name in order}
    top1 = [[100 * value for value in best[name].top1] for name in order]
    ranking(left, order, [looks[name] for name in order], top1, ".1f")
    room_beside(left, top1)
    random = {named(row) for row in rows if row["system"] == "random"}
    for name in order:
        layered = [way for way in ways[name] if way.pooling == "mean" and way.time == best[name].time]
        above = ON_TOP if name == name_of("pra") else 2
        if layered:
            at, heights = [way.layer for way in layered], [100 * way.mean for way in layered]
            style, width = "--" if name in random else "-", 2.8 if above == ON_TOP else 1.5
            right.plot(at, heights, style, linewidth=width, markersize=5, zorder=above, label=name, **looks[name])
        else:
            right.axhline(100 * best[name].mean, color=looks[name]["color"], linestyle=":", label=name)
    left.set(xlabel="top-1 accuracy (%), layer and pooling by validation\nmark: a seed; stroke: mean over seeds")
    right.set(xlabel="block of the model", ylabel="top-1 accuracy (%) of the mean token")
    right.set_title("colours and marks as on the left\ndashed: random weights; dotted: raw pixels", fontsize=9)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.grid(alpha=0.3)
    figure.supxlabel(_error_of_counting(rows, statistics.mean(each.mean for each in best.values())), fontsize=9)


def _error_of_counting(rows: list[Row], share: float) -> str:
    """Return the error of a figure by the number of held-out images alone."""
    held_out = min(row["held_out"] for row in rows)
    error = 100 * math.sqrt(share * (1 - share) / held_out)
    return f"{held_out} held-out images: a figure's standard error from their number alone is {error:.1f} points."


def named(row: Row) -> str:
    """The system for people; where it is random weights, whose."""
    return name_of(row["system"], row.get("value"))


def by_name(rows: Iterable[Row]) -> dict[str, list[Probed]]:
    """Every way of reading each system, by the system's name."""
    found: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        way = (row.get("layer"), row.get("pooling"), row.get("time"))
        found.setdefault(named(row), {}).setdefault(way, []).append(row)
    return {
        name: [
            Probed(layer, pooling, time, [row["top1"] for row in own], [row["validation"] for row in own])
            for (layer, pooling, time), own in sorted(ways.items(), key=lambda pair: _order(*pair[0]))
        ]
        for name, ways in found.items()
    }


def chosen(ways: Iterable[Probed]) -> Probed:
    """The way that validation chooses, of those that every seed has been read in."""
    ways = list(ways)
    most = max(len(way.top1) for way in ways)
    whole = [way for way in ways if len(way.top1) == most]
    return max(whole, key=lambda way: statistics.mean(way.validation))


def _order(layer: int | None, pooling: str | None, time: float | None) -> tuple[int, str, float]:
    return layer or 0, pooling or "", time or 0.0


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
