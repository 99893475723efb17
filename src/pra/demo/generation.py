"""What a visitor asks for, checked, and the pictures that come of it, row by row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pra.config import SHORTCUT_STEPS, ImageConfig, SamplingConfig, Solver
from pra.demo.exhibit import Exhibit
from pra.errors import PraError
from pra.models import Model

MOST_PICTURES = 16
MOST_STEPS = 100
MOST_GUIDANCE = 10.0
LAST_SEED = 10**9
EVERY_CLASS = -1
"""In place of a label: the classes in turn."""
OWN_STEPS = 0
"""In place of a number of steps: what each model recommends."""


@dataclass(frozen=True)
class Request:
    """What a visitor asked for.

    Args:
        label: a class, the model's null class, or :data:`EVERY_CLASS`.
        seed: of the first picture; the next ones have the seeds that follow.
        count: pictures, 1 to :data:`MOST_PICTURES`.
        guidance: scale, 0 to :data:`MOST_GUIDANCE`; 1 is none.
        steps: solver intervals, 1 to :data:`MOST_STEPS`, or :data:`OWN_STEPS`.

    Raises:
        PraError: anything else, an empty field (None) included.
    """

    label: int
    seed: int
    count: int
    guidance: float
    steps: int

    def __post_init__(self) -> None:
        if self.label is None:
            raise PraError("no class is chosen; choose one")
        _whole("seed", self.seed, 0, LAST_SEED)
        _whole("number of pictures", self.count, 1, MOST_PICTURES)
        _within("guidance", self.guidance, 0.0, MOST_GUIDANCE)
        _whole("number of steps", self.steps, OWN_STEPS, MOST_STEPS)

    def labels(self, classes: int) -> list[int]:
        """One per picture, for a model of that many classes."""
        if self.label == EVERY_CLASS:
            return [place % classes for place in range(int(self.count))]
        return [int(self.label)] * int(self.count)

    def seeds(self) -> list[int]:
        """One per picture."""
        return [int(self.seed) + place for place in range(int(self.count))]


@dataclass(frozen=True)
class Sheet:
    """What one model has made so far.

    Args:
        name: the model's.
        pictures: ``(B, C, h, W)`` in [-1, 1] on the CPU, the first ``h`` of ``height`` pixel rows.
        height: ``H``, of finished pictures.
        kept: pixel rows that are the visitor's own.
        captions: one per picture.
        note: what was done in place of what was asked for, in words.
        error: why there is no more, in words.
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
    """The sheets of all models, each time rows are finished; the models take turns.

    Args:
        exhibits: what generates: each the same labels and seeds.
        request: what is wanted.
        keep: per model ``(C, k * p, W)``, the first rows of a picture to go on from.
    """
    kept: Sequence[Tensor | None] = keep if keep is not None else [None] * len(exhibits)
    parts = [_sheets(exhibit, request, rows) for exhibit, rows in zip(exhibits, kept, strict=True)]
    sheets: list[Sheet] = [next(part) for part in parts]
    yield tuple(sheets)
    for news in itertools.zip_longest(*parts):
        sheets = [new or old for new, old in zip(news, sheets, strict=True)]
        yield tuple(sheets)


def keep_rows(picture: Tensor, model: ImageConfig, share: float) -> Tensor:
    """The first rows of patches of ``(C, H, W)``, the whole number nearest to a share in [0, 1] of them."""
    rows = round(min(max(share, 0.0), 1.0) * model.grid[0])
    return picture[:, : rows * model.patch_size]


def sampling_of(model: Model, request: Request) -> SamplingConfig:
    """A model's sampling with what is asked for: where it takes certain numbers of steps alone, with the nearest."""
    own = model.sampling
    steps = int(request.steps) or min(own.steps, MOST_STEPS)
    if own.solver is Solver.SHORTCUT:
        steps = min(SHORTCUT_STEPS, key=lambda learnt: abs(learnt - steps))
    return replace(own.with_steps(steps), guidance=float(request.guidance))


def _sheets(exhibit: Exhibit, request: Request, keep: Tensor | None) -> Iterator[Sheet]:
    """One model's; the first before anything is made. An error ends them, and is told on the last."""
    model, config = exhibit.model, exhibit.model.config
    labels, seeds = request.labels(config.num_classes), request.seeds()
    names = (*model.classes, "no class")
    captions = tuple(f"{names[label]}, seed {seed}" for label, seed in zip(labels, seeds, strict=True))
    start = torch.zeros(config.channels, 0, config.image_size[1]) if keep is None else keep
    pictures = start.expand(len(labels), *start.shape)
    sheet = Sheet(exhibit.name, pictures, config.image_size[0], start.shape[1], captions)
    yield sheet
    try:
        settings = sampling_of(model, request)
        if request.steps not in (OWN_STEPS, settings.steps):
            learnt = ", ".join(map(str, SHORTCUT_STEPS))
            sheet = replace(
                sheet, note=f"{settings.steps} steps in place of {request.steps:g}: this model takes {learnt}"
            )
        stream = exhibit.samplers.of(settings).stream(labels, seeds, None if keep is None else pictures)
        for pictures in stream:
            sheet = replace(sheet, pictures=pictures.cpu())
            yield sheet
    except PraError as error:
        yield replace(sheet, error=str(error))
    except torch.OutOfMemoryError:
        yield replace(sheet, error=f"no memory for {len(labels)} pictures at once on this device; ask for fewer")


def _whole(what: str, value: float | None, low: int, high: int) -> None:
    _within(what, value, low, high)
    if value != int(value or 0):
        raise PraError(f"the {what} must be a whole number, got {value:g}")


def _within(what: str, value: float | None, low: float, high: float) -> None:
    if value is None or not math.isfinite(value):
        raise PraError(f"the {what} is empty; give a number from {low:g} to {high:.15g}")
    if not low <= value <= high:
        raise PraError(f"the {what} must lie between {low:g} and {high:.15g}, got {value:.15g}")
