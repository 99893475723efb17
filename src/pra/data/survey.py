"""Summaries of a source: of some pictures, before a training, and of every picture, for ``pra data check``."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pra.config import TextConfig
from pra.data.captions import CorruptCaption
from pra.data.images import CorruptImage, check_aspect
from pra.data.loader import PIECE, blocks, from_workers, in_order, none_readable
from pra.data.source import Captioned, Source, Streamed, check_told_apart, open_source
from pra.errors import escaped
from pra.utils.progress import Progress

LOOKED_AT, PATIENCE = 500, 15.0
"""Pictures that :func:`look` opens at most, and the seconds after which it opens no more."""
COLOURFUL = 16
"""Levels between the channels of one pixel from which a picture counts as coloured: JPEG tints grey ones a little."""
_LINES = 20
_EXAMPLES, _SHOWN = 5, 200


class Range(NamedTuple):
    """Lowest, median and highest of some pixel counts."""

    low: int
    median: int
    high: int

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}, median {self.median}"

    @classmethod
    def of(cls, values: Iterable[int]) -> Range:
        ordered = sorted(values)
        return cls(ordered[0], ordered[len(ordered) // 2], ordered[-1])


@dataclass(frozen=True)
class Survey:
    """The findings of :func:`look`: the number of all pictures, in all and by class, and what the ``opened`` ones are.

    Classes without pictures are left out.

    Sizes are in pixels; ``grey``, ``transparent`` and ``square`` are counts; ``corrupt`` names files that do not count
    as opened.
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
        return len(self.classes) == 1

    @property
    def channels(self) -> int:
        """1 if no opened picture has colour, else 3."""
        return 1 if self.grey == self.opened else 3

    def lines(self) -> list[str]:
        """Return the summary for a person."""
        counts = sorted(self.classes.values())
        told = "without classes" if self.unconditional else f"in {len(counts)} classes of {counts[0]} to {counts[-1]}"
        looked = self.opened + len(self.corrupt)
        opened = "" if looked == self.images else f"; {looked} of them opened"
        mixed = f"{self.opened - self.grey} in colour, {self.grey} grey"
        colour = {0: "in colour", self.opened: "grey"}.get(self.grey, mixed)
        lines = [f"{self.images} pictures {told}{opened}", f"width {self.width}; height {self.height}; {colour}"]
        if self.transparent:
            lines.append(f"{self.transparent} with transparent parts, which are put on white")
        if self.corrupt:
            lines.append(f"{len(self.corrupt)} cannot be read and are passed over, such as {self.corrupt[0]}")
        return list(map(escaped, lines))


def look(source: str | Source) -> Survey:
    """Open up to :data:`LOOKED_AT` pictures of a source, at random, for at most :data:`PATIENCE` seconds.

    Refuse a source in which no picture can be read, and two classes of one name.
    """
    opened = open_source(source) if isinstance(source, str) else source
    check_told_apart(opened)
    begin = time.monotonic()
    order = np.random.default_rng(0).permutation(len(opened))[:LOOKED_AT].tolist()  # sources are sorted by class
    seen: list[tuple[int, int, bool, bool]] = []
    corrupt: list[str] = []
    for index in order:
        try:
            picture = opened.image(index)
            clear = picture.has_transparency_data and int(np.asarray(picture.convert("RGBA"))[..., 3].min()) < 255
            seen.append((*picture.size, clear, _has_colour(picture)))
        except CorruptImage:
            corrupt.append(opened.where(index))
        if seen and time.monotonic() - begin > PATIENCE:
            break
    if not seen:
        raise none_readable(opened, len(corrupt), corrupt[0])
    widths, heights, transparent, coloured = zip(*seen, strict=True)
    return Survey(
        source=opened.name,
        images=len(opened),
        classes={name: count for name, count in _class_counts(opened) if count},
        opened=len(seen),
        width=Range.of(widths),
        height=Range.of(heights),
        short_side=Range.of(map(min, widths, heights)),
        grey=len(seen) - sum(coloured),
        transparent=sum(transparent),
        square=sum(width == height for width, height in zip(widths, heights, strict=True)),
        corrupt=tuple(corrupt),
        seconds_per_image=(time.monotonic() - begin) / len(seen),
        streamed=isinstance(opened, Streamed),
    )


def _class_counts(source: Source) -> list[tuple[str, int]]:
    counts = np.bincount(source.labels, minlength=len(source.classes))
    return list(zip(source.classes, counts.tolist(), strict=True))


def _has_colour(picture: Image.Image) -> bool:
    """Look at a small copy: single pixels of noise do not matter."""
    if picture.mode in ("1", "L", "LA") or picture.mode.startswith("I"):
        return False
    pixels = np.asarray(picture.convert("RGBA").resize((32, 32), Image.Resampling.BOX)).astype(int)
    visible = pixels[pixels[..., 3] > 0][:, :3]
    return bool(len(visible)) and int(np.ptp(visible, axis=1).max()) > COLOURFUL


class _Captions:
    """Counts the captions of ``images`` images, and those longer than ``most`` bytes."""

    def __init__(self, images: int, most: int) -> None:
        self._every, self._most = -(-images // _EXAMPLES), most
        self._longest: dict[str, Any] = {"bytes": 0}
        self._lacking = list[dict[str, Any]]()
        self._counts, self._characters, self._bytes = Counter[int](), Counter[int](), Counter[int]()
        self._examples = list[str]()

    def add(self, where: str, found: tuple[str, ...] | str) -> None:
        """Take the captions of an image, or the problem with them."""
        if isinstance(found, str):
            self._lacking.append({"where": where, "problem": found})
            return
        if self._counts.total() % self._every == 0:  # from all over the data, which are often sorted
            self._examples.append(found[0][:_SHOWN])
        self._counts[len(found)] += 1
        for text in found:
            size = len(text.encode(errors="replace"))
            self._characters[len(text)] += 1
            self._bytes[size] += 1
            if size > self._longest["bytes"]:
                self._longest = {"where": where, "bytes": size, "text": text[:_SHOWN]}

    def report(self) -> dict[str, Any]:
        """Return JSON values; lengths are :class:`Range` of captions."""
        kinds = {"per_image": self._counts, "characters": self._characters, "bytes": self._bytes}
        return {
            "captions": self._bytes.total(),
            "lacking": self._lacking,
            **{name: Range.of(counts.elements()) if counts else None for name, counts in kinds.items()},
            "max_length": self._most,
            "longer": sum(count for size, count in self._bytes.items() if size > self._most),
            "longest": self._longest,
            "examples": self._examples,
        }


def check(source: Source, size: int | None, workers: int, max_length: int = TextConfig.max_length) -> dict[str, Any]:
    """Decode every image of a source, with ``workers`` processes, and return JSON values.

    ``corrupt`` lists the images that cannot be used; ``classes``, ``sizes`` and ``modes`` are counts of images;
    ``smaller_than_size`` lists those with a side below ``size``, the side of the model's images. ``captions`` is None
    for a source without; ``longer`` counts those of more than ``max_length`` bytes, ``lacking`` lists images without.
    """
    corrupt, small = list[dict[str, Any]](), list[dict[str, Any]]()
    sizes, modes = Counter[tuple[int, int]](), Counter[str]()
    first: dict[tuple[int, int], dict[str, Any]] = {}
    count = len(source)
    captions = _Captions(count, max_length) if isinstance(source, Captioned) else None
    work = functools.partial(_look_at, source, size)
    stream = from_workers(work, blocks(range(count), PIECE), in_order(source, workers))
    with closing(stream) as found, Progress(desc="checking", total=count, unit="image", smoothing=0.05) as bar:
        for block in found:
            bar.update(len(block))
            for image in block:
                if "problem" in image:
                    corrupt.append(image)
                    continue
                modes[image.pop("mode")] += 1
                if captions:
                    captions.add(image["where"], image.pop("captions"))
                side = image["width"], image["height"]
                sizes[side] += 1
                first.setdefault(side, image)
                if min(side) < (size or 0):
                    small.append(image)
    return {
        "source": source.name,
        "images": count,
        "corrupt": corrupt,
        "classes": [{"name": name, "images": number} for name, number in _class_counts(source)],
        "sizes": [{"width": w, "height": h, "images": number} for (w, h), number in sizes.most_common()],
        "modes": dict(modes.most_common()),
        # min and max return the first of equal ones.
        "smallest": first[min(first, key=math.prod)] if first else None,
        "largest": first[max(first, key=math.prod)] if first else None,
        "size": size,
        "smaller_than_size": small,
        "captions": captions.report() if captions else None,
    }


def _look_at(source: Source, size: int | None, block: Sequence[int]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index in block:
        where = source.where(index)
        try:
            image = source.image(index)
            if size:
                check_aspect(image, (size, size), where)
            found.append({"where": where, "width": image.width, "height": image.height, "mode": image.mode})
            if isinstance(source, Captioned):
                found[-1]["captions"] = _captions_of(source, index)
        except CorruptImage as error:
            found.append({"index": index, "where": where, "problem": error.problem})
    return found


def _captions_of(source: Captioned, index: int) -> tuple[str, ...] | str:
    try:
        return source.captions(index)
    except CorruptCaption as error:
        return error.problem


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return the main findings of :func:`check`, for a person."""
    classes = [(one["images"], one["name"]) for one in report["classes"] if one["images"]]
    empty = [one["name"] for one in report["classes"] if not one["images"]]
    (fewest, scarce), (most, frequent) = min(classes), max(classes)
    sizes = ["{width}x{height} ({images})".format(**one) for one in report["sizes"]]
    lines = [
        f"corrupt: {len(report['corrupt'])}",
        *_some("  {where}: {problem}".format(**image) for image in report["corrupt"]),
        f"classes: {len(classes)}, {fewest} ({scarce}) to {most} ({frequent}) images",
        *_some(f"  {name}: {count}" for count, name in classes),
        *([f"classes without images: {len(empty)}, such as {empty[0]}"] if empty else []),
        f"sizes (width x height): {len(sizes)}; {', '.join(sizes[:5])}",
        f"modes: {', '.join(f'{mode} ({count})' for mode, count in report['modes'].items())}",
    ]
    for name in ("smallest", "largest"):
        lines += ["{0}: {width}x{height}, {where}".format(name, **report[name])] if report[name] else []
    if size := report["size"]:
        small = report["smaller_than_size"]
        lines += [f"smaller than {size}x{size}: {len(small)}"]
        lines += _some("  {width}x{height}, {where}".format(**image) for image in small)
    if found := report["captions"]:
        lines += _caption_lines(found)
    return list(map(escaped, lines))


def _caption_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"images without a caption: {len(found['lacking'])}"
    yield from _some("  {where}: {problem}".format(**image) for image in found["lacking"])
    if total := found["captions"]:
        yield f"captions: {total}; {found['per_image']} an image"
        yield f"  characters: {found['characters']}; bytes: {found['bytes']}"
        share = f"{found['longer']} ({found['longer'] / total:.1%})"
        yield f"  longer than {found['max_length']} bytes, and cut there by a model of that length: {share}"
        yield "  longest: {bytes} bytes, {where}: {text!r}".format(**found["longest"])
        yield from (f"  such as {text!r}" for text in found["examples"])


def _some(lines: Iterable[str]) -> Sequence[str]:
    every = list(lines)
    more = [f"  ... and {len(every) - _LINES} more (--out FILE.json has all)"] if len(every) > _LINES else []
    return [*every[:_LINES], *more]
