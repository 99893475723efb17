"""Rows of pictures under each other, each with a title. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def labelled_rows(rows: Sequence[tuple[str, Image.Image]]) -> Figure:
    """A figure of pictures of one size, grey or RGB, with their titles on the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.82 * len(rows)))
    panels = figure.subplots(
        len(rows), 1, squeeze=False, gridspec_kw={"left": 0.19, "right": 1, "bottom": 0, "top": 1, "hspace": 0}
    )
    for axes, (title, picture) in zip(panels.flat, rows, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure
