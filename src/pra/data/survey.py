"""What a source of pictures holds: how many, how large, of which classes, in colour or grey, and which are broken."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from pra.data.images import CorruptImage
from pra.data.source import Source, Streamed, open_source
from pra.errors import PraError

LOOKED_AT, PATIENCE = 500, 15.0
"""Pictures that are opened, and the seconds after which those that were opened must do."""

COLOURFUL = 16
"""Levels between the channels of one pixel, from which a picture counts as coloured: JPEG tints grey ones a little."""


class Range(NamedTuple):
    """Of pixels."""

    low: int
    median: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}, median {self.median}"


@dataclass(frozen=True)
class Survey:
    """What :func:`look` found.

    ``images`` is how many there are, by class in ``classes``. All else is of the ``opened`` ones: sizes in pixels;
    how many have no colour (``grey``), are see-through somewhere, or are not ``square``; the file of each that cannot
    be read (not counted among the opened); and the seconds that reading one takes. ``streamed`` tells whether the
    source is a stream.
    """

    source: str
    images: int
    classes: dict[str, int]
    opened: int
    width: Range
    height: Range
    short_side: Range
    grey: int
    transparent: int
    square: int
    corrupt: tuple[str, ...]
    seconds_per_image: float
    streamed: bool = False

    @property
    def unconditional(self) -> bool:
        """Whether there are no classes to tell apart."""
        return len(self.classes) == 1

    @property
    def channels(self) -> int:
        """1 where no picture that was opened has colour, else 3."""
        return 1 if self.grey == self.opened else 3

    def lines(self) -> list[str]:
        """For a person."""
        counts = sorted(self.classes.values())
        told = "without classes" if self.unconditional else f"in {len(counts)} classes of {counts[0]} to {counts[-1]}"
        looked = self.opened + len(self.corrupt)
        opened = "" if looked == self.images else f"; {looked} of them opened"
        colour = {0: "in colour", self.opened: "grey"}.get(
            self.grey, f"{self.opened - self.grey} in colour, {self.grey} grey"
        )
        lines = [
            f"{self.images} pictures {told}{opened}",
            f"width {self.width}; height {self.height}; {colour}",
        ]
        if self.transparent:
            lines.append(f"{self.transparent} with transparent parts, which are put on white")
        if self.corrupt:
            lines.append(f"{len(self.corrupt)} cannot be read and are passed over, such as {self.corrupt[0]}")
        return lines


def look(source: str | Source) -> Survey:
    """Opens pictures of a source, all or :data:`LOOKED_AT` at random, for :data:`PATIENCE` seconds at most.

    Raises:
        PraError: no such source, nothing in it, or not one picture that can be read.
    """
    opened = open_source(source) if isinstance(source, str) else source
    count, begin = len(opened), time.monotonic()
    order = np.random.default_rng(0).permutation(count)[:LOOKED_AT].tolist()  # a source lists class after class
    sizes: list[tuple[int, int]] = []
    corrupt: list[str] = []
    grey = transparent = 0
    for index in order:
        try:
            picture = opened.image(index)
        except CorruptImage:
            corrupt.append(opened.where(index))
            continue
        sizes.append(picture.size)
        transparent += _see_through(picture)
        grey += not _has_colour(picture)
        if time.monotonic() - begin > PATIENCE:
            break
    if not sizes:
        raise PraError(f"none of {len(corrupt)} pictures of {opened.name} can be read, such as {corrupt[0]}")
    widths, heights = zip(*sizes, strict=True)
    numbers = np.bincount(opened.labels, minlength=len(opened.classes)).tolist()
    return Survey(
        source=opened.name,
        images=count,
        classes=dict(zip(opened.classes, numbers, strict=True)),
        opened=len(sizes),
        width=_range(widths),
        height=_range(heights),
        short_side=_range([min(size) for size in sizes]),
        grey=grey,
        transparent=transparent,
        square=sum(width == height for width, height in sizes),
        corrupt=tuple(corrupt),
        seconds_per_image=(time.monotonic() - begin) / len(sizes),
        streamed=isinstance(opened, Streamed),
    )


def _range(values: tuple[int, ...] | list[int]) -> Range:
    return Range(min(values), sorted(values)[len(values) // 2], max(values))


def _see_through(picture: Image.Image) -> bool:
    if not picture.has_transparency_data:
        return False
    alpha = picture.convert("RGBA").getchannel("A").getextrema()
    return alpha[0] < 255  # type: ignore[operator]


def _has_colour(picture: Image.Image) -> bool:
    """Looked at small: single pixels of noise do not matter."""
    if picture.mode in ("1", "L", "LA") or picture.mode.startswith("I"):
        return False
    picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)).astype(int)
    seen = small[..., :3][small[..., 3] > 0] if picture.mode == "RGBA" else small.reshape(-1, 3)
    return bool(len(seen)) and int((seen.max(axis=1) - seen.min(axis=1)).max()) > COLOURFUL
