"""Curves of a run, drawn from its metrics."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pra.images import write_atomically
from pra.train.run import read_metrics

CURVES = "curves.png"
PANELS = {
    "flow": "L_flow (head)",
    "reconstruction": "L_rec (codec)",
    "auxiliary": "L_aux",
    "state_std": "smallest state deviation",
    "gradient_norm": "gradient norm",
    "images_per_second": "images / s",
}
LOGARITHMIC = ("flow", "reconstruction", "auxiliary", "gradient_norm")
"""Panels with a logarithmic axis, where all values are positive."""


def draw_curves(run: Path) -> Path | None:
    """Writes ``curves.png``, one panel per metric; None where there is nothing to draw, or matplotlib is missing."""
    rows = read_metrics(run)
    if len(rows) < 2 or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        steps = [row["step"] for row in rows]
        values = [row[name] for row in rows]
        axes.plot(steps, values, color="#08519c", linewidth=1.2)
        axes.set(title=title, xlabel="step")
        if name in LOGARITHMIC and min(values) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    path = run / CURVES
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return path
