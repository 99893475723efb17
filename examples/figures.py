"""Draws the figures of docs/method.md from a trained run: the two passes, sampling, the inputs at several t.

python examples/figures.py runs/fashion docs/images

Every picture in them is the model's own: its training images, states, reconstructions, inputs and samples. Figures of
an earlier call are replaced.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

import pra
from pra import PraError
from pra.data import load_images, open_source
from pra.method import flow, noise, rollout
from pra.method.noise import Purpose
from pra.training.run import read_run
from pra.utils.files import write_atomically
from pra.utils.pixels import from_uint8, to_pil

TIMES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.0)
"""Times of the perturbed states in the figure of the inputs; 1 is unperturbed."""

PIXEL_NOISE = 0.3
"""Standard deviation of the noise on pixels that PRA is compared with: that of the system ``input-noise``."""

SHOWN = 5
"""Images in the figure of the inputs, each of another class."""

FOLLOWED = 1
"""The image that the other figures follow."""

INK, FAINT, TRAINED, FROZEN, LOSS = "#22223b", "#8d99ae", "#dbe7ff", "#eceff4", "#b5179e"


Span = tuple[float, float]
"""Ends of the drawing, left and right."""


class Example:
    """The content of the figures: a few training images, and the model's tensors for them."""

    def __init__(self, run: Path) -> None:
        config, model = read_run(run), pra.load(run)
        if not isinstance(model, pra.PRA) or model.config.codec is None:
            raise PraError(f"{run} has no learned states; the figures show those: give the run of a PRA")
        self.model, self.columns = model, model.config.grid[1]
        source = open_source(config.data.source)
        _, chosen = np.unique(source.labels, return_index=True)
        chosen = chosen[:SHOWN].tolist()
        if len(chosen) <= FOLLOWED:
            raise PraError(f"{source.name} has one class; the figures show images of several")
        pixels, self.labels = load_images(source, chosen, config.model.image_size, config.model.channels, config.data)
        self.real = from_uint8(pixels)
        self.patches = model.patchify(self.real)
        with torch.no_grad():
            self.states = model.codec.encode(self.patches, model.clean_conditions(self.labels, self.patches))
            self.rebuilt = model.unpatchify(model.write(self.states))
        self.keys = noise.keys(config.train.seed, torch.tensor(chosen))
        self.t_min = getattr(config.train.rollout, "t_min", 0.0)

    def perturbed(self, t: float | Tensor) -> Tensor:
        """States ``t z + (1 - t) eps``, with the noise that a training step of these images draws."""
        eps = noise.normal(noise.fold(self.keys, Purpose.ROLLOUT_NOISE), *self.states.shape[1:])
        return flow.interpolate(eps, self.states, torch.as_tensor(t))

    @torch.no_grad()
    def written(self, states: Tensor) -> Tensor:
        """The images ``(B, C, H, W)`` that the decoder writes from states."""
        return self.model.unpatchify(self.model.write(states))

    def trained_on(self) -> tuple[Tensor, Tensor]:
        """The states ``z~`` of a training step and the inputs ``x~`` they become, each position with a ``t_i``."""
        t = flow.uniform_times(
            noise.fold(self.keys, Purpose.ROLLOUT_TIME), self.states.shape[1], 1, low=self.t_min, high=1.0
        )
        states = self.perturbed(t)
        return states, self.written(states)

    def sampled(self) -> list[Tensor]:
        """A sample of each shown class, after each row of patches."""
        seeds = range(len(self.labels))
        return list(pra.Sampler(self.model).stream(self.labels.tolist(), seeds))

    def as_colours(self, states: Tensor) -> Tensor:
        """States ``(N, d)``, three of their numbers as red, green and blue: ``(3, rows, columns)`` in [-1, 1]."""
        return (states[:, :3] / 2.0).clamp(-1, 1).unflatten(0, (-1, self.columns)).permute(2, 0, 1)


def main(run: Path, folder: Path) -> None:
    example = Example(run)
    figures = {"training": training(example), "sampling": sampling(example), "inputs": inputs(example)}
    for name, figure in figures.items():
        path = folder / f"method-{name}.png"
        write_atomically(path, figure.savefig, format="png", dpi=150)
        print(path)


# --- the two passes -----------------------------------------------------------------------------------------


def training(example: Example) -> Figure:
    """Draw both passes, left to right, with images shown as pictures."""
    figure, axes = canvas(11.2, 4.5)
    perturbed, fed = (values[FOLLOWED] for values in example.trained_on())
    z, z_tilde = example.as_colours(example.states[FOLLOWED]), example.as_colours(perturbed)
    places = (0.8, 2.65, 4.5, 6.35, 8.2, 10.2)
    top, bottom = 3.3, 0.95

    heading(axes, 0.25, 4.3, "Reconstruction pass: the states learn to hold the image")
    pass_one = [
        thumbnail(axes, places[0], top, example.real[FOLLOWED], "image $x$", lines=example.columns),
        box(axes, places[1], top, "encoder $G$", TRAINED),
        thumbnail(axes, places[2], top, z, f"states $z$: {example.states.shape[2]} numbers each"),
        box(axes, places[3], top, "decoder $D$\ncausal", TRAINED),
        thumbnail(axes, places[4], top, example.rebuilt[FOLLOWED], "reconstruction"),
        box(axes, places[5], top, "$L_{rec}$: against $x$", "white", LOSS),
    ]
    connect(axes, top, pass_one)

    heading(axes, 1.05, 2.05, "AR pass: inputs with the errors of sampling, all positions at once")
    pass_two = [
        thumbnail(axes, places[0], bottom, z_tilde, r"$\tilde z = t z + (1-t)\,\epsilon$"),
        box(axes, places[1], bottom, "decoder $D$\nno gradient", FROZEN),
        thumbnail(axes, places[2], bottom, fed, r"inputs $\tilde x$"),
        box(axes, places[3], bottom, "backbone $F$\ncausal", TRAINED),
        box(axes, places[4], bottom, "head $v$\nper position", TRAINED),
        box(axes, places[5], bottom, "$L_{flow}$: states $z$\n$L_{aux}$: patches $x$", "white", LOSS),
    ]
    connect(axes, bottom, pass_two, {3: "$h_i$"})
    # The states go down once, without gradient: reconstruction alone shapes them.
    axes.plot([places[2], places[2], places[0]], [2.42, 2.22, 2.22], color=FAINT, linewidth=1.2)
    arrow(axes, (places[0], 2.22), (places[0], bottom + 0.6), FAINT)
    note(axes, places[1], 2.33, "no gradient")
    return figure


# --- sampling -----------------------------------------------------------------------------------------------


def sampling(example: Example) -> Figure:
    """A picture row by row, and the steps at one position."""
    rows = example.model.config.grid[0]
    pictures = [step[FOLLOWED] for step in example.sampled()]
    figure, axes = canvas(11.2, 3.7)
    heading(axes, 0.25, 3.6, "The whole image, in raster order")
    steps = []
    for place, done in enumerate(sorted({max(1, round(rows * part / 6)) for part in range(1, 7)})):
        whole = pictures[-1].new_ones(pictures[-1].shape)
        whole[:, : pictures[done - 1].shape[1]] = pictures[done - 1]
        steps.append(thumbnail(axes, 0.8 + 1.92 * place, 2.65, whole, f"after row {done}", lines=example.columns))
    connect(axes, 2.65, steps)

    heading(axes, 0.25, 1.65, "One position: the model reads its own patch next")
    middle = 0.85
    chain = [
        box(axes, 1.02, middle, "class tokens,\npatches $x_{<i}$", "white"),
        box(axes, 3.35, middle, "backbone $F$\nwith cache", TRAINED),
        box(axes, 5.75, middle, "head $v$: ODE,\nguided", TRAINED),
        box(axes, 8.15, middle, "decoder $D$\nwith cache", TRAINED),
        box(axes, 10.3, middle, "patch $x_i$", "white"),
    ]
    connect(axes, middle, chain, {1: "$h_i$", 2: "$z_i$"})
    axes.plot([10.3, 10.3, 3.35], [middle - 0.4, 0.15, 0.15], color=LOSS, linewidth=1.4)
    arrow(axes, (3.35, 0.15), (3.35, middle - 0.4), LOSS)
    note(axes, 6.8, 0.27, "the next input: one more token in each cache")
    return figure


# --- the inputs ---------------------------------------------------------------------------------------------


def inputs(example: Example) -> Figure:
    """Draw what the backbone reads in training under each choice, beside what it reads in sampling."""
    noised = rollout.noised(example.patches, PIXEL_NOISE, example.keys)
    noised = example.model.unpatchify(torch.cat([noised, example.patches[:, -1:]], dim=1))  # the last is never read
    columns = [("true\npatches", example.real), (f"noise on\npixels, {PIXEL_NOISE:g}", noised)]
    columns += [(f"states at\n$t$ = {t:g}", example.written(example.perturbed(t))) for t in TIMES]
    columns.append(("samples", example.sampled()[-1]))
    count, height = len(columns), len(example.real)
    figure = Figure(figsize=(1.12 * count, 1.12 * height + 0.75), layout="constrained", facecolor="white")
    grid = figure.subplots(height, count, squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        grid[0][column].set_title(title, fontsize=11, color=INK)
        for row, picture in enumerate(pictures):
            show(grid[row][column], picture)
            grid[row][column].set_axis_off()
    return figure


# --- drawing ------------------------------------------------------------------------------------------------


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure to draw on in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def show(axes: Axes, picture: Tensor, **place: Sequence[float]) -> None:
    axes.imshow(to_pil(picture).convert("RGB"), interpolation="nearest", **place)


def thumbnail(axes: Axes, x: float, y: float, picture: Tensor, title: str, lines: int = 0) -> Span:
    """A picture of 1.1 inches around (x, y), with the borders of its patches if asked for."""
    half = 0.55
    show(axes, picture, extent=(x - half, x + half, y - half, y + half))
    for line in range(1, lines):
        at = 2 * half * line / lines
        axes.plot([x - half + at] * 2, [y - half, y + half], color="white", linewidth=0.4, alpha=0.6)
        axes.plot([x - half, x + half], [y - half + at] * 2, color="white", linewidth=0.4, alpha=0.6)
    axes.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=FAINT, linewidth=0.8))
    axes.text(x, y - half - 0.07, title, ha="center", va="top", fontsize=12, color=INK)
    axes.set_aspect("auto")
    return x - half, x + half


def box(axes: Axes, x: float, y: float, text: str, colour: str, edge: str = INK) -> Span:
    half, height = 0.75, 0.72
    shape = FancyBboxPatch(
        (x - half, y - height / 2), 2 * half, height, boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=colour, edgecolor=edge, linewidth=1.1,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color=INK)
    return x - half, x + half


def connect(axes: Axes, y: float, spans: Sequence[Span], labels: dict[int, str] | None = None) -> None:
    """Arrows from each to the next; ``labels`` by the number of the one an arrow comes from."""
    for number, ((_, start), (end, _)) in enumerate(itertools.pairwise(spans)):
        arrow(axes, (start + 0.06, y), (end - 0.06, y))
        note(axes, (start + end) / 2, y + 0.2, (labels or {}).get(number, ""))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, shrinkA=0, shrinkB=0))


def heading(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="left", va="top", fontsize=13.5, fontweight="bold", color=INK)


def note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color=INK)


if __name__ == "__main__":
    matplotlib.rcParams["mathtext.fontset"] = "cm"
    if len(sys.argv) != 3:
        print("figures: error: give a RUN and a FOLDER to write to", file=sys.stderr)
        sys.exit(2)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except PraError as error:
        print(f"figures: error: {error}", file=sys.stderr)
        sys.exit(2)
