"""Line charts for a page: positions and labels, which the template draws as SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
MOST_POINTS = 120
"""Beyond that, neighbours are averaged: more cannot be told apart at this size."""

Points = Sequence[tuple[float, float]]


class Tick(NamedTuple):
    """A place on an axis, in the picture's units, and its label."""

    at: float
    label: str


class Dot(NamedTuple):
    """A point in the picture, and the text under a pointer that rests on it."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve. ``style`` is a CSS class; ``path`` the points of an SVG polyline."""

    style: str
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """A chart for the template; ``level`` is the height of a horizontal line to compare with, if any."""

    title: str
    x_name: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    level: float | None = None


def chart(
    title: str, x_name: str, curves: Sequence[tuple[str, Points]], log: bool = False, level: float | None = None
) -> Chart | None:
    """Place curves, a CSS class and points each, in a picture of ``WIDTH x HEIGHT``; None where none has two points.

    Points that are not finite are left out. ``log`` makes the vertical axis logarithmic where all values are positive.
    """
    finite = [(style, [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]) for style, points in curves]
    finite = [(style, points) for style, points in finite if len(points) > 1]
    if not finite:
        return None
    xs = [x for _, points in finite for x, _ in points]
    ys = [y for _, points in finite for _, y in points] + ([] if level is None else [level])
    log = log and min(ys) > 0
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=False)
    y_axis = _Axis(*_with_margin(min(ys), max(ys), log), HEIGHT - BOTTOM, TOP, log)
    lines = []
    for style, points in finite:
        dots = [Dot(x_axis.place(x), y_axis.place(y), f"{x_name} {x:g}: {y:.4g}") for x, y in thinned(points)]
        lines.append(Line(style, " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in dots), dots))
    return Chart(
        title, x_name, lines, x_axis.ticks(), y_axis.ticks(), None if level is None else round(y_axis.place(level), 1)
    )


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most ``most`` points, each the mean of consecutive ones."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


@dataclass(frozen=True)
class _Axis:
    """Values ``low`` to ``high`` on ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (self.end - self.start) * ((here - low) / (high - low) if high > low else 0.5), 1)

    def ticks(self) -> list[Tick]:
        values = _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)
        return [Tick(self.place(value), f"{value:.4g}") for value in values]


def _with_margin(low: float, high: float, log: bool) -> tuple[float, float]:
    """Keep a curve off the frame, and a constant one in the middle."""
    if log:
        factor = (high / low) ** 0.05 if high > low else 2.0
        return low / factor, high * factor
    margin = (high - low) * 0.05 or abs(high) * 0.5 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten; with 2 and 5 between them where there are few, else round numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5)):
        found = [m * 10.0**power for power in powers for m in multiples if low <= m * 10.0**power <= high]
        if len(found) >= 3:
            return found[:: -(-len(found) // 6)]
    return _ticks(low, high)
