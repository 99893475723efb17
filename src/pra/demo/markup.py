"""Sheets, descriptions and messages as HTML, by the templates in ``parts.html``, which escape all names."""

from __future__ import annotations

import base64
import functools
import io
import re
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from pra.errors import PraError
from pra.evaluation.report import charts
from pra.utils.extras import import_failed
from pra.utils.pixels import to_pil

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
SMALL = 128
"""Pixels; smaller pictures are enlarged pixel by pixel, without smoothing."""


def html(part: str, *values: Any) -> str:
    """Return a part of the page: ``head``, ``stage``, ``models``, ``words`` or ``error``, each from its own values."""
    return str(getattr(_templates(), part)(*values))


@functools.cache
def _templates() -> Any:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("pra.demo", ""), PackageLoader("pra.evaluation.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"chart": charts, "SMALL": SMALL}
    environment.filters["card"], environment.filters["uri"] = _card, _data_uri
    return environment.get_template("parts.html").module


def _card(text: str) -> Markup:
    """Render a model card, which may be a stranger's: nothing in it runs, and nothing is loaded from elsewhere.

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


def _data_uri(picture: Tensor) -> str:
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, "PNG", compress_level=1)  # many a second: quickly rather than small
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
