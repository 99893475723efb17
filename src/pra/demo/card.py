"""A model card as HTML. It may be anybody's: nothing of it runs, nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from pra.errors import PraError
from pra.utils.extras import import_failed

FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)


def card_html(text: str) -> str:
    """Markdown, without the front matter and without pictures; tags in it are shown, and stay without effect.

    Links leave the page by a new window; one that leads to a file beside the card is text, for the page serves none.

    Raises:
        PraError: the package that reads Markdown cannot be imported.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise PraError(import_failed("a model card", "markdown-it-py", "demo", error)) from None
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.add_render_rule("image", lambda *_: "")
    reader.add_render_rule("link_open", _link)
    return str(reader.render(FRONT_MATTER.sub("", text)))


def _link(renderer: Any, tokens: Any, index: int, options: Any, _: Any) -> str:
    token = tokens[index]
    outside = str(token.attrs.get("href", "")).startswith(("https://", "http://"))
    token.attrs = {**token.attrs, "target": "_blank", "rel": "noopener noreferrer"} if outside else {}
    return str(renderer.renderToken(tokens, index, options, _))
