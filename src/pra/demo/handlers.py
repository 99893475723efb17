"""What the buttons of the page do, told in HTML and pictures; the page itself is :mod:`.page`'s."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from pra.demo import markup
from pra.demo.about import describe
from pra.demo.exhibit import Exhibit
from pra.demo.generation import Request, Sheet, answer, keep_rows
from pra.demo.upload import fit_upload, read_upload
from pra.errors import PraError
from pra.utils.pixels import to_pil

MOST_KEPT = 48
"""Pictures in a visitor's gallery; older ones go."""

BROKEN = "something is wrong with this demo, and not with what you asked for; whoever runs it finds it in the log"

Entry = tuple[Image.Image, str]
"""A picture of a gallery, and its caption."""

News = tuple[str, str, list[Entry]]
"""Pictures, a line about how it goes, and the visitor's gallery."""


@dataclass
class Turn:
    """Which press of a visitor's button counts: the latest. To stop is a press that asks for nothing.

    Gradio's own way to cancel an event lets late news of it through, and can take the next press with it.
    """

    number: int = 0

    def next(self) -> int:
        """A new press: what was pressed before is over."""
        self.number += 1
        return self.number


class Handlers:
    """What the buttons do. Of a generator's values the last is what stays on the page.

    Args:
        exhibits: the models, one or two.
    """

    def __init__(self, exhibits: Sequence[Exhibit]) -> None:
        self.exhibits = exhibits

    def generate(
        self, label: int, seed: int, count: int, guidance: float, steps: int, kept: list[Entry],
        turn: Turn, number: int,
    ) -> Iterator[News]:  # fmt: skip
        """Stage, status and gallery, each time rows are finished."""
        try:
            request = Request(label, seed, count, guidance, steps)
            yield from _played(answer(self.exhibits, request), request, kept, turn, number)
        except Exception as error:
            yield "", _in_words(error), kept

    def complete(
        self, path: str | None, rows: int, label: int, seed: int, count: int, guidance: float, steps: int,
        kept: list[Entry], turn: Turn, number: int,
    ) -> Iterator[News]:  # fmt: skip
        """As :meth:`generate`, from the first rows of an uploaded picture."""
        try:
            request = Request(label, seed, count, guidance, steps)
            keep = self._kept_rows(path, rows)[0]
            yield from _played(answer(self.exhibits, request, keep), request, kept, turn, number)
        except Exception as error:
            yield "", _in_words(error), kept

    def preview(self, path: str | None, rows: int) -> str:
        """The uploaded picture as the models get it, and what was done to it."""
        if path is None:
            return ""
        try:
            keep, fitted, done = self._kept_rows(path, rows)
            sheets = [
                Sheet(exhibit.name, picture.unsqueeze(0), picture.shape[1], part.shape[1], (f"{line}; {_told(part)}",))
                for exhibit, picture, part, line in zip(self.exhibits, fitted, keep, done, strict=True)
            ]
            return markup.show_sheets(sheets)
        except Exception as error:
            return _in_words(error)

    def about(self) -> str:
        """What the models are, as their folders tell it now."""
        try:
            return markup.show_models([describe(exhibit) for exhibit in self.exhibits])
        except Exception as error:
            return _in_words(error)

    def _kept_rows(self, path: str | None, rows: int) -> tuple[list[Tensor], list[Tensor], list[str]]:
        """Per model: what is kept of the picture, the whole of it, and what was done to it."""
        if path is None:
            raise PraError("no picture is uploaded; choose one to complete")
        upload = read_upload(Path(path))
        fitted = [fit_upload(upload, exhibit.model.config, exhibit.data) for exhibit in self.exhibits]
        share = rows / self.exhibits[0].model.config.grid[0]
        keep = [
            keep_rows(picture, exhibit.model.config, share)
            for exhibit, (picture, _) in zip(self.exhibits, fitted, strict=True)
        ]
        return keep, [picture for picture, _ in fitted], [done for _, done in fitted]


def _played(
    parts: Iterator[tuple[Sheet, ...]], request: Request, kept: list[Entry], turn: Turn, number: int
) -> Iterator[News]:
    begin = time.monotonic()
    sheets: tuple[Sheet, ...] = ()
    for sheets in parts:
        if turn.number != number:
            yield markup.show_sheets(sheets), markup.say("stopped"), kept
            return
        done = min(sheet.pictures.shape[2] / sheet.height for sheet in sheets)
        yield markup.show_sheets(sheets), markup.say(f"{done:.0%} of the rows"), kept
    whole = [sheet for sheet in sheets if sheet.finished and not sheet.error]
    several = len(sheets) > 1
    new = [
        (to_pil(picture), ", ".join([*([sheet.name] if several else []), caption, f"guidance {request.guidance:g}"]))
        for sheet in whole
        for picture, caption in zip(sheet.pictures, sheet.captions, strict=True)
    ]
    seconds = time.monotonic() - begin
    told = f"{len(new)} pictures in {seconds:.1f} s" if new else "nothing was made"
    yield markup.show_sheets(sheets), markup.say(told), [*new, *kept][:MOST_KEPT]


def _in_words(error: Exception) -> str:
    """For the visitor, who cannot mend what is wrong with the server: where it happened stands in the server's log."""
    if isinstance(error, PraError):
        return markup.complain(error)
    traceback.print_exception(error)
    return markup.complain(PraError(BROKEN))


def _told(kept: Tensor) -> str:
    return "what is above the line is kept" if kept.shape[1] else "nothing is kept"
