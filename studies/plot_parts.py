"""Parts that the plots of the studies share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from studies.names import look_of, name_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

ON_TOP = 3
"""Drawing order (``zorder``) of PRA's curves: above all others."""
LEAST_SPAN = 1.15
"""Least span of a logarithmic axis, so that a tiny difference does not fill it."""


def logarithmic(axes: Axes, axis: str = "y") -> None:
    """Make an axis logarithmic, with ticks as plain numbers: the shorter its span, the finer.

    FID needs it: on a linear axis, a system that fails would flatten all others.
    """
    from matplotlib.ticker import FixedLocator

    of: Axis = axes.yaxis if axis == "y" else axes.xaxis
    axes.set(**{f"{axis}scale": "log"})
    low, high = axes.get_ylim() if axis == "y" else axes.get_xlim()
    if low > 0 and high < LEAST_SPAN * low:
        middle = (low * high) ** 0.5
        low, high = middle / LEAST_SPAN**0.5, middle * LEAST_SPAN**0.5
        axes.set(**{f"{axis}lim": (low, high)})
    of.set_major_locator(FixedLocator(ticks_between(low, high)))
    of.set_major_formatter("{x:g}")
    axes.minorticks_off()


def ticks_between(low: float, high: float) -> list[float]:
    """Return round numbers for the ticks of a logarithmic axis: at least five if there are as many, and few more."""
    sets: tuple[tuple[float, ...], ...] = (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
        (1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5),
        tuple(1 + step / 10 for step in range(90)),
        tuple(1 + step / 20 for step in range(180)),
    )
    between: list[float] = []
    for digits in sets:
        between = [digit * 10.0**power for power in range(-6, 6) for digit in digits]
        between = [tick for tick in between if low <= tick <= high]
        if len(between) >= 5:
            break
    return between


def dots(
    axes: Axes, at: float, values: Iterable[float], look: dict[str, Any], upright: bool = True, hollow: bool = False
) -> None:
    """Draw a mark for each seed; ``at`` is their place on the x axis, or on the y axis if not ``upright``."""
    values = list(values)
    places = [at] * len(values)
    xs, ys = (places, values) if upright else (values, places)
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.7}
    if hollow:
        edge = {"markeredgecolor": look["color"], "markeredgewidth": 1.4, "markerfacecolor": "white"}
    axes.plot(xs, ys, linestyle="none", markersize=7, zorder=ON_TOP + 1, **look, **edge)


def curve(axes: Axes, by_place: Mapping[float, Sequence[float]], system: str) -> None:
    """Draw a mark for each seed, hollow if it is the only one, and the line of their means, named for the legend."""
    for place, values in by_place.items():
        dots(axes, place, values, look_of(system), hollow=len(values) == 1)
    means = [statistics.mean(values) for values in by_place.values()]
    # Only the legend shows the line's own markers.
    axes.plot(list(by_place), means, markevery=[], label=name_of(system), **look_of(system), **_weight(system))


def banded(axes: Axes, by_place: Mapping[float, Sequence[float]], system: str) -> None:
    """Draw the line of the seeds' means in the band from the least to the greatest."""
    look, weight = look_of(system), _weight(system)
    places, values = list(by_place), list(by_place.values())
    means = [statistics.mean(each) for each in values]
    axes.plot(places, means, markersize=5, label=name_of(system), **look, **weight)
    if any(len(each) > 1 for each in values):
        lows, highs = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(
            places, lows, highs, color=look["color"], alpha=0.15, linewidth=0, zorder=weight["zorder"] - 1
        )


def _weight(system: str) -> dict[str, Any]:
    """Return the width and drawing order of a system's curve: PRA's is thicker and above the others."""
    return {"linewidth": 2.8, "zorder": ON_TOP} if system == "pra" else {"linewidth": 1.6, "zorder": 2}


def ranking(
    axes: Axes,
    names: Sequence[str],
    looks: Sequence[dict[str, Any]],
    values: Sequence[Sequence[float]],
    form: str = ".2f",
) -> None:
    """Draw a line for each name: a mark for each seed, a stroke at the mean of several, and the mean as text."""
    for place, (look, each) in enumerate(zip(looks, values, strict=True)):
        mean = statistics.mean(each)
        if len(each) > 1:
            axes.plot([mean], [place], "|", color="black", markersize=17, markeredgewidth=1.2, zorder=ON_TOP + 2)
        apart = min(0.14, 0.5 / len(each))  # one above the other, so that equal ones stay two
        for seed, value in enumerate(each):
            dots(axes, place + apart * (seed - (len(each) - 1) / 2), [value], look, upright=False)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "bbox": box}
        axes.annotate(f"{mean:{form}}", (max(each), place), xytext=(9, 0), **beside)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def room_beside(axes: Axes, values: Sequence[Sequence[float]], log: bool = False) -> None:
    """Sets the x axis so that what :func:`ranking` writes beside the last dot has room."""
    low, high = min(map(min, values)), max(map(max, values))
    if log:
        ratio = max(high / low, 1.2)
        axes.set(xscale="log", xlim=(low / ratio**0.08, high * ratio**0.26))
    else:
        span = max(high - low, 1e-3)
        axes.set_xlim(low - 0.08 * span, high + 0.22 * span)


def legend_below(figure: Figure, panels: Axes | Sequence[Axes], order: Sequence[str] = (), note: str = "") -> None:
    """Name the curves in the given order, below all panels and a note."""
    named: dict[str, Artist] = {}
    for axes in panels if isinstance(panels, Sequence) else [panels]:
        handles, texts = axes.get_legend_handles_labels()
        named |= dict(zip(texts, handles, strict=True))
    labels = sorted(named, key=lambda name: order.index(name) if name in order else len(order))
    if labels:
        figure.legend([named[label] for label in labels], labels, loc="outside lower center", ncols=4, title=note)
