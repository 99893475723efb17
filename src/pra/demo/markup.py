"""How it looks: sheets, descriptions and messages as HTML. Names and messages are escaped: they are other people's."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from pra.demo.about import About
from pra.demo.card import card_html
from pra.demo.generation import Sheet
from pra.evaluation.report import charts
from pra.utils.pixels import to_pil

SMALL = 128
"""Pixels; smaller pictures are enlarged as they are, pixel by pixel, and not smoothed."""


def head(title: str, line: str) -> str:
    """What stands above the page."""
    return _render("head", title, line)


def show_sheets(sheets: Sequence[Sheet]) -> str:
    """The pictures so far, one section a model."""
    return _render("stage", [_shown(sheet) for sheet in sheets])


def show_models(abouts: Sequence[About]) -> str:
    """What the models are."""
    return _render("models", abouts)


def say(text: str) -> str:
    """A line about how it goes."""
    return _render("words", text, "")


def complain(error: Exception) -> str:
    """An error that a person can correct."""
    return _render("words", str(error), "error")


@dataclass(frozen=True)
class _Shown:
    """A sheet as the template needs it; ``cut`` is where the visitor's own rows end, in per cent of the height."""

    name: str
    uris: list[str]
    captions: tuple[str, ...]
    note: str
    error: str
    ratio: str
    done: int
    small: bool
    cut: str


def _shown(sheet: Sheet) -> _Shown:
    done, width = sheet.pictures.shape[2:]
    cut = f"{100 * sheet.kept / sheet.height:.2f}" if 0 < sheet.kept < sheet.height else ""
    uris = [_data_uri(picture) if done else "" for picture in sheet.pictures]
    ratio = f"{width} / {sheet.height}"
    return _Shown(sheet.name, uris, sheet.captions, sheet.note, sheet.error, ratio, done, sheet.height <= SMALL, cut)


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
    environment.globals["chart"] = charts
    environment.filters["card"] = lambda text: Markup(card_html(text))
    return environment.get_template("parts.html").module


def _render(macro: str, *values: Any) -> str:
    return str(getattr(_macros(), macro)(*values))
