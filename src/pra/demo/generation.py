"""Requests of visitors, checked, and the pictures made for them, row by row."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pra.config import SHORTCUT_STEPS, SamplingConfig, Solver
from pra.demo.exhibit import Exhibit
from pra.errors import PraError, counted, one_line
from pra.evaluation.report import sampling_in_words
from pra.models import Model

MOST_PICTURES = 16
MOST_STEPS = 100
MOST_GUIDANCE = 10.0
LAST_SEED = 10**9
LONGEST_NAME, LONGEST_CAPTION = 200, 10_000
"""Letters of a class, and of a caption, that a visitor types."""
SHOWN = 200
"""Letters of a caption that stand below a picture."""
EVERY_CLASS = -1
"""A label: each class in turn."""
OWN_STEPS = 0
"""A number of steps that means each model's recommendation."""


@dataclass(frozen=True)
class Request:
    """Pictures that a visitor asks for. Refuses values out of range, and empty fields (``None``).

    ``label`` may be the model's null class or :data:`EVERY_CLASS`; ``seed`` is that of the first picture, and the next
    ones follow; ``steps`` may be :data:`OWN_STEPS`. Models that read captions draw ``caption``, if it is not blank.
    ``tier`` names settings in place of guidance and steps, for models that have measured ones.
    """

    label: int
    seed: int
    count: int
    guidance: float
    steps: int
    caption: str = ""
    tier: str = ""

    def __post_init__(self) -> None:
        if self.label is None:
            raise PraError("no class is chosen. Choose one", code="missing")
        _check("seed", self.seed, 0, LAST_SEED)
        _check("number of pictures", self.count, 1, MOST_PICTURES)
        _check("guidance", self.guidance, 0, MOST_GUIDANCE, whole=False)
        _check("number of steps", self.steps, OWN_STEPS, MOST_STEPS)
        if (length := len(self.caption)) > LONGEST_CAPTION:
            problem = f"the caption has {length:,} letters. Give at most {LONGEST_CAPTION:,}"
            raise PraError(problem, code="too-large", name="caption", value=length)


@dataclass(frozen=True)
class Sheet:
    """The pictures of one model so far: ``(B, C, h, W)`` in [-1, 1] on the CPU, the first ``h`` of ``height`` rows.

    ``kept`` pixel rows are the visitor's own. ``note`` says what was changed in the request, and ``error`` why it ended
    early.
    """

    name: str
    pictures: Tensor
    height: int
    kept: int
    captions: tuple[str, ...]
    note: str = ""
    error: str = ""

    @property
    def finished(self) -> bool:
        """Whether the pictures are whole."""
        return self.pictures.shape[2] == self.height


def answer(
    exhibits: Sequence[Exhibit], request: Request, keep: Sequence[Tensor] | None = None
) -> Iterator[tuple[Sheet, ...]]:
    """Yield the sheets of all models whenever rows are finished; the models take turns, with the same labels and seeds.

    ``keep`` holds per model ``(C, k * p, W)``, the first rows of a picture to continue.
    """
    kept: Sequence[Tensor | None] = keep if keep is not None else [None] * len(exhibits)
    parts = [_sheets(exhibit, request, rows) for exhibit, rows in zip(exhibits, kept, strict=True)]
    sheets: list[Sheet] = [next(part) for part in parts]
    yield tuple(sheets)
    for news in itertools.zip_longest(*parts):
        sheets = [new or old for new, old in zip(news, sheets, strict=True)]
        yield tuple(sheets)


def class_number(chosen: Any, model: Model) -> Any:
    """Return the class that a visitor has chosen or typed: a name, or else a number. Refuse unknown classes."""
    if not isinstance(chosen, str):
        return chosen
    text = chosen.strip()[:LONGEST_NAME]
    is_number = text not in model.classes and re.fullmatch(r"\d{1,9}", text, re.ASCII)
    return int(model.condition.parse(int(text) if is_number else text, model.classes))


def sampling_of(model: Model, request: Request) -> SamplingConfig:
    """Return a model's sampling changed as asked for; a distilled model gets the nearest steps that it has learnt."""
    own = model.sampling
    steps = int(request.steps) or min(own.steps, MOST_STEPS)
    if own.solver is Solver.SHORTCUT:
        steps = min(SHORTCUT_STEPS, key=lambda learnt: abs(learnt - steps))
    guidance, most = float(request.guidance), model.config.shortcut_guidance
    if own.solver is Solver.SHORTCUT and most is not None:
        guidance = min(max(guidance, 1.0), most)
    return replace(own.with_steps(steps), guidance=guidance)


def _sheets(exhibit: Exhibit, request: Request, keep: Tensor | None) -> Iterator[Sheet]:
    """Yield the sheets of one model, the first one empty. The last carries an error, if there was one."""
    model, config = exhibit.model, exhibit.model.config
    labels, text = _labels(exhibit, request), model.condition.kept(request.caption)
    seeds = [int(request.seed) + place for place in range(int(request.count))]
    chosen: Sequence[int | None] = labels or [None] * len(seeds)
    told = [_in_words(exhibit, label, text) for label in chosen]
    captions = tuple(f"{what}, seed {seed}" for what, seed in zip(told, seeds, strict=True))
    start = torch.zeros(config.channels, 0, config.image_size[1]) if keep is None else keep
    pictures = start.expand(len(seeds), *start.shape)
    sheet = Sheet(exhibit.name, pictures, config.image_size[0], start.shape[1], captions)
    yield sheet
    try:
        tier = next((tier for tier in exhibit.tiers if tier.name == request.tier), None)
        settings = tier.sampling if tier else sampling_of(model, request)
        notes = [_about_caption(exhibit, request.caption)]
        if tier:
            notes.append(f"{tier.name}: {sampling_in_words(settings, config.unit)}")
        elif request.steps not in (OWN_STEPS, settings.steps):
            instead = f"{settings.steps} steps instead of {request.steps:g}"
            notes.append(f"{instead}: this model takes {', '.join(map(str, SHORTCUT_STEPS))}")
        sheet = replace(sheet, note="; ".join(filter(None, notes)))
        texts = [text] * len(seeds) if exhibit.reads_captions else None
        stream = exhibit.samplers.of(settings).stream(labels, seeds, None if keep is None else pictures, texts)
        for pictures in stream:
            sheet = replace(sheet, pictures=pictures.cpu())
            yield sheet
    except PraError as error:
        yield replace(sheet, error=str(error))
    except torch.OutOfMemoryError:
        yield replace(sheet, error=f"not enough memory for {counted(len(seeds), 'picture')} at once. Ask for fewer")


def _labels(exhibit: Exhibit, request: Request) -> list[int] | None:
    """Return a class per picture, or None for a model without a choice of classes."""
    if not exhibit.takes_class:
        return None
    each, places = exhibit.model.config.num_classes, range(int(request.count))
    return [place % each if request.label == EVERY_CLASS else int(request.label) for place in places]


def _in_words(exhibit: Exhibit, label: int | None, text: str) -> str:
    """Return a picture's caption: the class, the text, or both."""
    shown, names = one_line(text, SHOWN), (*exhibit.model.classes, "no class")
    if label is None or (shown and label == exhibit.model.condition.null):
        return shown or "no caption"
    return f"{one_line(names[label])}, {shown}" if shown else one_line(names[label])


def _about_caption(exhibit: Exhibit, caption: str) -> str:
    """Return a note about the part of a caption that the model does not read, or an empty text."""
    if caption.strip() and not exhibit.reads_captions:
        return "this model does not read captions"
    return exhibit.model.condition.unread([caption])


def _check(what: str, value: float | None, low: int, high: float, whole: bool = True) -> None:
    limits = f"{'a whole' if whole else 'a'} number from {low} to {high:.15g}"
    if value is None or not math.isfinite(value):
        raise PraError(f"the {what} is empty. Give {limits}", code="missing", name=what)
    if not low <= value <= high or (whole and value != int(value)):
        raise PraError(f"the {what} {value:.15g} is wrong. Give {limits}", name=what, value=f"{value:.15g}")
