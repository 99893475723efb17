"""Every image of a source read once: what is corrupt, how large they are, how the classes are filled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pra.data.images import CorruptImage
from pra.data.loader import from_workers, in_order, reading
from pra.data.source import Source
from pra.utils.progress import Progress

_BLOCK = 32
_LINES = 10
"""Of images of a kind; the rest is in the report."""
_CLASSES = 20
"""More are shown as a histogram."""
_BAR = 40


class _Seen(NamedTuple):
    """One image: its size and mode, or what is wrong with it."""

    number: int
    width: int = 0
    height: int = 0
    mode: str = ""
    problem: str | None = None


@dataclass
class Findings:
    """What was found in a source. Sizes are ``(width, height)``; ``size`` is the side below which an image is small."""

    source: Source
    size: int | None
    corrupt: list[tuple[int, str]] = field(default_factory=list)
    small: list[_Seen] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    smallest: _Seen | None = None
    largest: _Seen | None = None

    def add(self, seen: _Seen) -> None:
        """Count one image."""
        if seen.problem is not None:
            self.corrupt.append((seen.number, seen.problem))
            return
        self.sizes[seen.width, seen.height] += 1
        self.modes[seen.mode] += 1
        if self.size and min(seen.width, seen.height) < self.size:
            self.small.append(seen)
        if self.smallest is None or _area(seen) < _area(self.smallest):
            self.smallest = seen
        if self.largest is None or _area(seen) > _area(self.largest):
            self.largest = seen

    @property
    def class_counts(self) -> list[int]:
        """Images of each class, the corrupt ones among them."""
        counts = np.bincount(self.source.labels, minlength=len(self.source.classes))
        return [int(count) for count in counts]

    def report(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "source": self.source.name,
            "images": len(self.source),
            "corrupt": [
                {"index": index, "where": self.source.where(index), "problem": problem}
                for index, problem in self.corrupt
            ],
            "classes": [
                {"name": name, "images": count}
                for name, count in zip(self.source.classes, self.class_counts, strict=True)
            ],
            "sizes": [{"width": w, "height": h, "images": count} for (w, h), count in self.sizes.most_common()],
            "modes": dict(self.modes.most_common()),
            "smallest": self._described(self.smallest),
            "largest": self._described(self.largest),
            "size": self.size,
            "smaller_than_size": [self._described(seen) for seen in self.small],
        }

    def lines(self) -> list[str]:
        """What matters, for a person."""
        found = [f"corrupt: {len(self.corrupt)}"]
        found += _some(f"  {self.source.where(index)}: {problem}" for index, problem in self.corrupt)
        found += _class_lines(self.source.classes, self.class_counts)
        common = ", ".join(f"{w}x{h} ({count})" for (w, h), count in self.sizes.most_common(5))
        found.append(f"sizes (width x height): {len(self.sizes)}; {common}")
        found.append(f"modes: {', '.join(f'{mode} ({count})' for mode, count in self.modes.most_common())}")
        for name, seen in (("smallest", self.smallest), ("largest", self.largest)):
            if seen:
                found.append(f"{name}: {seen.width}x{seen.height}, {self.source.where(seen.number)}")
        if self.size:
            found.append(f"smaller than {self.size}x{self.size}: {len(self.small)}")
            found += _some(f"  {seen.width}x{seen.height}, {self.source.where(seen.number)}" for seen in self.small)
        return found

    def _described(self, seen: _Seen | None) -> dict[str, Any] | None:
        if seen is None:
            return None
        return {"where": self.source.where(seen.number), "width": seen.width, "height": seen.height}


def check(source: Source, size: int | None, workers: int) -> Findings:
    """Decode every image of a source.

    Args:
        source: what to read.
        size: the side of the model's images, to find those that are smaller.
        workers: processes that read and decode.

    Raises:
        PraError: the source breaks off. Corrupt images are among the findings.
    """
    findings = Findings(source, size)
    count = len(source)
    blocks = (range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))
    looked_at = from_workers(_Reader(source), blocks, in_order(source, workers))
    with reading(looked_at) as seen, Progress(desc="checking", total=count, unit="image", smoothing=0.05) as bar:
        for block in seen:
            for image in block:
                findings.add(image)
            bar.update(len(block))
    return findings


class _Reader:
    """Sizes and modes of a range of images."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __call__(self, block: range) -> list[_Seen]:
        return [self._seen(index) for index in block]

    def _seen(self, index: int) -> _Seen:
        try:
            image = self._source.image(index)
        except CorruptImage as error:
            return _Seen(index, problem=error.problem)
        return _Seen(index, image.width, image.height, image.mode)


def _area(seen: _Seen) -> int:
    return seen.width * seen.height


def _some(lines: Any) -> list[str]:
    shown = list(lines)
    more = [f"  ... and {len(shown) - _LINES} more (--out FILE.json has all)"] if len(shown) > _LINES else []
    return shown[:_LINES] + more


def _class_lines(classes: tuple[str, ...], counts: list[int]) -> list[str]:
    """The spread of the classes' sizes; a bar for each class, or for each tenth of the range where they are many."""
    fewest, most = int(np.argmin(counts)), int(np.argmax(counts))
    ratio = f"{counts[most] / counts[fewest]:.2f}" if counts[fewest] else "infinite"
    head = (
        f"classes: {len(classes)}, {counts[fewest]} ({classes[fewest]}) to {counts[most]} ({classes[most]}) images, "
        f"median {np.median(counts):g}, most over fewest {ratio}"
    )
    if len(classes) <= _CLASSES:
        rows = list(zip(classes, counts, strict=True))
    else:
        heights, edges = np.histogram(counts, bins=min(10, counts[most] - counts[fewest] + 1))
        rows = [
            (f"{low:.0f} to {high:.0f} images", int(height))
            for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True)
        ]
    width, top = max(len(name) for name, _ in rows), max(count for _, count in rows)
    unit = "" if len(classes) <= _CLASSES else " classes"
    return [
        head,
        *(f"  {name:>{width}} {'#' * round(_BAR * count / top):{_BAR}} {count}{unit}" for name, count in rows),
    ]
