"""Sheets, descriptions and messages as HTML, by the templates in ``parts.html``, which escape all names."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from pra.demo.about import About
from pra.demo.generation import Sheet
from pra.errors import PraError
from pra.evaluation.report import charts
from pra.utils.extras import import_failed
from pra.utils.pixels import to_pil

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
SMALL = 128
"""Pixels; smaller pictures are enlarged pixel by pixel, without smoothing."""


def head(title: str, line: str) -> str:
    """Return the title of the page."""
    return _render("head", title, line)


def show_sheets(sheets: Sequence[Sheet]) -> str:
    """Return the pictures so far, one section a model."""
    return _render("stage", sheets)


def show_models(abouts: Sequence[About]) -> str:
    """Return the descriptions of the models."""
    return _render("models", abouts)


def say(text: str) -> str:
    """Return a status line."""
    return _render("words", text, "")


def complain(error: Exception) -> str:
    """Return an error that a person can correct."""
    return _render("words", str(error), "error")


def card_html(text: str) -> Markup:
    """Render a model card, which may be a stranger's: nothing in it runs, and nothing is loaded from elsewhere.

    The front matter and pictures are left out, and HTML tags are shown as text.

    Links open a new window. A link to a file beside the card becomes text, since the page serves no files.

    Raises:
        PraError: the package that reads Markdown cannot be imported.
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


def _data_uri(picture: Tensor) -> str:
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, "PNG", compress_level=1)  # many a second: quickly rather than small
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.cache
def _macros() -> Any:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("pra.demo", ""), PackageLoader("pra.evaluation.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"chart": charts, "SMALL": SMALL}
    environment.filters["card"], environment.filters["uri"] = card_html, _data_uri
    return environment.get_template("parts.html").module


def _render(macro: str, *values: Any) -> str:
    return str(getattr(_macros(), macro)(*values))
