"""The study `probe` as a table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pra.studies.measures import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Probed:
    """One way of reading a system over its seeds: a layer, a pooling, and JiT's time, where there are such.

    ``top1`` on the held-out set and ``validation``, one per seed.
    """

    layer: int | None
    pooling: str | None
    time: float | None
    top1: list[float]
    validation: list[float]

    @property
    def mean(self) -> float:
        """Of ``top1``."""
        return statistics.mean(self.top1)


def about_probe(rows: list[Row]) -> str:
    """How the figures came about, for the line above the table."""
    images, held_out = rows[0]["images"], rows[0]["held_out"]
    return (
        f"top-1 accuracy on {held_out} held-out images of a logistic regression fitted to {images} training images; "
        "L2, layer, pooling and JiT's time by a tenth of the latter"
    )


def probe_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines: a system each, at the layer, pooling and time that validation chooses on the seeds' mean."""
    lines = []
    for name, ways in by_name(rows).items():
        best = chosen(ways)
        spread = statistics.stdev(best.top1) if len(set(best.top1)) > 1 else None
        top1 = f"{100 * best.mean:.1f} %" + (f" ± {100 * spread:.1f}" if spread is not None else "")
        where = [_cell(best.layer), _cell(best.pooling), _cell(best.time)]
        # Both poolings together are twice as many numbers.
        means = [way for way in ways if way.pooling == "mean"]
        plain = f"{100 * chosen(means).mean:.1f} %" if means else "-"
        lines.append((best.mean, [name, top1, *where, plain, str(len(best.top1))]))
    head = ["features", "top-1", "layer", "pooling", "time", "top-1 of the mean token alone", "seeds"]
    return head, [line for _, line in sorted(lines, key=lambda pair: -pair[0])]


def draw_probe(figure: Figure, rows: list[Row], colours: Mapping[str, str]) -> None:
    """Each system at what validation chooses; and the mean token of each layer."""
    left, right = figure.subplots(1, 2)
    ways = by_name(rows)
    order = sorted(ways, key=lambda name: -chosen(ways[name]).mean)
    for place, name in enumerate(order):
        best, colour = chosen(ways[name]), colours.get(name, "#444444")
        left.barh(place, 100 * best.mean, color=colour, alpha=0.35)
        left.plot([100 * value for value in best.top1], [place] * len(best.top1), "o", color=colour, markersize=4)
        layered = [way for way in ways[name] if way.pooling == "mean" and way.time == best.time]
        if layered:
            style = "o:" if name.startswith("random") else "o-"
            at, heights = [way.layer for way in layered], [100 * way.mean for way in layered]
            right.plot(at, heights, style, color=colours.get(name), markersize=3, label=name)
        else:
            right.axhline(100 * best.mean, color=colour, linewidth=0.8, linestyle="--", label=name)
    lowest = min(100 * min(chosen(each).top1) for each in ways.values())
    left.set_xlim(left=max(0.0, lowest - 10))
    left.set_yticks(range(len(order)), order)
    left.invert_yaxis()
    left.set(xlabel="top-1 (%), layer and pooling by validation (each dot a seed)")
    right.set(xlabel="layer", ylabel="top-1 (%) of the mean token")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the curves, which fill the panel
    for axes in (left, right):
        axes.grid(alpha=0.3)


def by_name(rows: Iterable[Row]) -> dict[str, list[Probed]]:
    """Every way of reading each system, by the system's name."""
    found: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        value = row.get("value", "")
        name = f"{row['system']} ({value})" if value else row["system"]
        found.setdefault(name, {}).setdefault((row.get("layer"), row.get("pooling"), row.get("time")), []).append(row)
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
