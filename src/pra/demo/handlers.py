"""The buttons of the page, answered in pictures, and in HTML by the templates of ``parts.html``, which escape names."""

from __future__ import annotations

import functools
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from markupsafe import Markup
from PIL import Image

from pra.demo.exhibit import Exhibit, chooser, describe
from pra.demo.generation import Request, Sheet, answer, class_number
from pra.demo.upload import fit_upload
from pra.errors import PraError, counted
from pra.evaluation.report import data_uri, templates
from pra.utils.extras import import_failed
from pra.utils.pixels import to_pil

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
SMALL = 128
"""Pixels; smaller pictures are enlarged pixel by pixel, without smoothing."""
MOST_KEPT = 48
"""Pictures in a visitor's gallery; older ones go."""
BROKEN = "The demo failed. Your request is not the cause; the log of the demo has the error."

Entry = tuple[Image.Image, str]
"""A picture of a gallery, and its caption."""
News = tuple[str, str, list[Entry]]
"""Pictures, a status line, and the visitor's gallery."""


@dataclass
class Turn:
    """The number of the latest press of a visitor's buttons, which ends all earlier presses. "Stop" is a press, too.

    Gradio's own way to cancel an event lets late updates through, and can cancel the next press as well.
    """

    number: int = 0

    def next(self) -> int:
        """Return the number of a new press."""
        self.number += 1
        return self.number


class Handlers:
    """The buttons, for one model or two. The last value of a generator stays on the page."""

    def __init__(self, exhibits: Sequence[Exhibit]) -> None:
        self.exhibits = exhibits

    def make(
        self, kept: list[Entry], turn: Turn, number: int, path: str | None, rows: int | None, label: Any, *asked: Any
    ) -> Iterator[News]:
        """Yield stage, status and gallery whenever rows of patches are finished.

        ``path`` and ``rows`` are an uploaded picture and the rows to keep; without ``rows`` pictures are generated from
        scratch. ``label`` and ``asked`` are the fields of a request; the label may be text.
        """
        begin = time.monotonic()
        sheets: tuple[Sheet, ...] = ()
        try:
            request = Request(class_number(label, chooser(self.exhibits).model), *asked)
            uploaded = [] if rows is None else self._uploaded(path, rows)
            keep = [sheet.pictures[0, :, : sheet.kept] for sheet in uploaded]
            for sheets in answer(self.exhibits, request, keep or None):
                if turn.number != number:
                    yield html("stage", sheets), html("words", "stopped"), kept
                    return
                done = min(sheet.pictures.shape[2] / sheet.height for sheet in sheets)
                yield html("stage", sheets), html("words", f"{done:.0%} of the rows done"), kept
            new, how = [], request.tier or f"guidance {request.guidance:g}"
            for sheet in sheets:
                name = f"{sheet.name}, " if len(sheets) > 1 else ""
                if sheet.finished and not sheet.error:
                    for picture, caption in zip(sheet.pictures, sheet.captions, strict=True):
                        new.append((to_pil(picture), f"{name}{caption}, {how}"))
            told = (
                f"{counted(len(new), 'picture')} in {time.monotonic() - begin:.1f} s"
                if new
                else "no pictures were made"
            )
            yield html("stage", sheets), html("words", told), [*new, *kept][:MOST_KEPT]
        except Exception as error:
            yield "", _in_words(error), kept

    def preview(self, path: str | None, rows: int) -> str:
        """Return the uploaded picture as the models read it, and a line about its preparation."""
        return _told(lambda: html("stage", self._uploaded(path, rows))) if path else ""

    def about(self) -> str:
        """Return the descriptions of the models, read from their folders."""
        return _told(lambda: html("models", [describe(exhibit) for exhibit in self.exhibits]))

    def _uploaded(self, path: str | None, rows: int) -> list[Sheet]:
        """Return per model the whole picture, with the number of rows that are kept."""
        if path is None:
            raise PraError("no picture is uploaded. Choose one to complete", code="missing")
        sheets = []
        for exhibit in self.exhibits:
            config = exhibit.model.config
            picture, line = fit_upload(Path(path), config, exhibit.data)
            share = rows / self.exhibits[0].model.config.grid[0]
            kept = round(share * config.group_grid[0]) * config.group_height
            caption = f"{line}; {'the part above the line is kept' if kept else 'nothing is kept'}"
            sheets.append(Sheet(exhibit.name, picture.unsqueeze(0), picture.shape[1], kept, (caption,)))
        return sheets


def _told(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:
        return _in_words(error)


def _in_words(error: Exception) -> str:
    """Return a visitor's mistake unchanged, and a general line for an error of the server, which goes to the log."""
    if isinstance(error, PraError):
        return html("error", str(error))
    traceback.print_exception(error)
    return html("error", BROKEN)


def html(part: str, *values: Any) -> str:
    """Return a part of the page: ``head``, ``stage``, ``models``, ``words`` or ``error``, each from its own values."""
    text = str(getattr(_templates(), part)(*values))
    return text.encode(errors="backslashreplace").decode()  # a path may not be UTF-8


@functools.cache
def _templates() -> Any:
    environment = templates("pra.demo", autoescape=True, undefined=StrictUndefined)
    environment.globals["SMALL"] = SMALL
    environment.filters["card"] = _card
    # Many a second: quickly rather than small.
    environment.filters["uri"] = lambda picture: data_uri(to_pil(picture), "png", compress_level=1)
    return environment.get_template("parts.html").module


def _card(text: str) -> Markup:
    """Render a model card, which may be anybody's: nothing in it runs, and nothing is loaded from elsewhere.

    The front matter and pictures are left out, and HTML tags are shown as text. Links open a new window. A link to a
    file beside the card becomes text, since the page serves no files.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        problem = import_failed("a model card", "markdown-it-py", "demo", error)
        raise PraError(problem, code="not-installed") from None
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.add_render_rule("image", lambda *_: "")
    reader.add_render_rule("link_open", _link)
    return Markup(reader.render(FRONT_MATTER.sub("", text)))


def _link(renderer: Any, tokens: Any, index: int, options: Any, _: Any) -> str:
    token = tokens[index]
    outside = str(token.attrs.get("href", "")).startswith(("https://", "http://"))
    token.attrs = {**token.attrs, "target": "_blank", "rel": "noopener noreferrer"} if outside else {}
    return str(renderer.renderToken(tokens, index, options, _))
