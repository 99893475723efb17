"""The condition of an image by its class. A model owns its condition as a module."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pra.errors import PraError, nearest
from pra.utils.files import file_part

Labels: TypeAlias = int | str | Sequence[int | str] | Tensor
"""Classes by number or name; one alone is a batch of one. Or rows ``(B, 1 + L)`` of :mod:`pra.models.text`."""
Row: TypeAlias = Callable[[int, str], npt.NDArray[np.int64]]
"""Makes what a model is told of an image, int64 ``(1 + L,)``, from its class and a caption; it can be pickled."""
Texts: TypeAlias = str | Sequence[str]
"""Captions; one alone is a batch of one."""


class ClassCondition(nn.Module):
    """Learned prefix tokens for each class, and for the null class of classifier-free guidance (2207.12598).

    A batch of conditions is a tensor of labels, ``(B,)`` int64 in ``[0, num_classes]``; the last is the null class.
    Each has ``count`` tokens of ``width``. ``row`` makes the row of a batch from a class and a caption, where captions
    are read (:mod:`pra.models.text`).
    """

    row: Row | None = None

    def __init__(self, num_classes: int, count: int, width: int) -> None:
        super().__init__()
        self.null, self.count = num_classes, count
        self.embedding = nn.Embedding(num_classes + 1, count * width)

    @property
    def embeddings(self) -> list[nn.Parameter]:
        """Return the parameters that are embeddings, but in no ``nn.Embedding``."""
        return []

    def forward(self, labels: Tensor) -> Tensor:
        """Labels ``(B,)`` to prefix tokens ``(B, count, width)``."""
        return self.embedding(labels).view(len(labels), self.count, -1)  # type: ignore[no-any-return]

    def null_like(self, labels: Tensor) -> Tensor:
        """Return as many null conditions."""
        return torch.full_like(labels, self.null)

    def drop(self, labels: Tensor, drawn: Tensor, probability: float) -> Tensor:
        """Replace labels by the null class where ``drawn`` ``(B,)`` in [0, 1) is below ``probability``."""
        return labels.masked_fill(drawn < probability, self.null)

    def parse(self, given: Labels | None, classes: Sequence[str], captions: Texts | None = None) -> Tensor:
        """Return labels ``(B,)`` on the CPU, from classes by number or by name. Refuse others, and captions."""
        if captions is not None:
            self.texts(captions)
        if given is None:
            raise PraError("no labels are given. Give classes by number or name", code="missing")
        asked = listed(given)  # once: it may be an iterator
        numbers = [place_of(label, classes) if isinstance(label, str) else label for label in asked]
        labels = integers(numbers, "labels must be whole numbers of 64 bits or names of classes")
        wrong = labels[(labels < 0) | (labels > self.null)]
        if len(wrong):
            problem = f"is out of range: this model's classes are 0 to {self.null - 1}"
            raise PraError(f"label {int(wrong[0])} {problem}", value=int(wrong[0]))
        return labels

    def use(self, name: str) -> None:
        """Take a frozen encoder from another place: this condition has none."""
        raise PraError("this model has no frozen text encoder. Leave --weights out", code="conflict", name=name)

    def kept(self, text: str) -> str:
        """Return as much of a text as is read: nothing."""
        return ""

    def unread(self, texts: Sequence[str]) -> str:
        """Say in words what the model leaves out of the longest of some texts: nothing is said here."""
        return ""

    def texts(self, captions: Texts) -> list[str]:
        """Return captions as the model reads them: this condition refuses them."""
        raise PraError("this model draws classes and reads no captions. Give labels", code="unsupported")

    def file_name(self, label: int, classes: Sequence[str]) -> str:
        """Name a class in a file's name, such as ``0007-cat``; or a caption by its place among ``classes``."""
        part = file_part(classes[label])
        return f"{label:04d}-{part}" if part else f"{label:04d}"  # an empty caption

    def rows_for(self, known: Sequence[str], classes: Sequence[str]) -> list[int]:
        """Return the row of ``embedding`` that each of other ``classes`` begins with, their null class last.

        A class whose name is among ``known``, this condition's own, keeps its row; a new one takes the null class's.
        Refuse a name that classes of both share and several of one have, unless all classes are the same.
        """
        if tuple(known) == tuple(classes):
            return [*range(len(known)), self.null]
        there, here = Counter(known), Counter(classes)
        twice = next((name for name in classes if there[name] and there[name] + here[name] > 2), None)
        if twice is not None:
            problem = f"{there[twice]} of the model's classes and {here[twice]} of the data are called {twice!r}"
            raise PraError(f"{problem}. Rename those of the data, to begin them anew", code="conflict", value=twice)
        places = {name: place for place, name in enumerate(known)}
        return [*(places.get(name, self.null) for name in classes), self.null]


def place_of(name: str, classes: Sequence[str]) -> int:
    """Return the number of the class of that name. Refuse a name that no class has, or several have."""
    if name not in classes:
        raise PraError(f"no class {name!r}{nearest(name, classes)}", code="unknown", value=name)
    places = [str(place) for place, known in enumerate(classes) if known == name]
    if len(places) > 1:
        problem = f"{len(places)} classes are called {name!r}. Give one of their numbers: {', '.join(places[:9])}"
        raise PraError(problem, code="conflict", value=name)
    return int(places[0])


def listed(values: Any) -> list[Any]:
    """Return the values of a tensor, an array or a sequence; one value as a list of one."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def integers(values: Any, expected: str) -> Tensor:
    """Return whole numbers as int64 on the CPU, neither rounded nor wrapped. Refuse others, and say ``expected``."""
    given = listed(values)
    try:
        return torch.tensor([operator.index(value) for value in given], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = " ".join(repr(given).split())[:200]
        raise PraError(f"{expected}, got {value}", value=value) from None
