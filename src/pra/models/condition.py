"""The condition of an image by its class: a module of the model."""

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
"""Classes by number or name, or rows ``(B, 1 + L)`` of :mod:`pra.models.text`. A single class is a batch of one."""
Row: TypeAlias = Callable[[int, str], npt.NDArray[np.int64]]
"""A function from a class and a caption to a row of a batch of conditions, int64 ``(1 + L,)``; it can be pickled."""
Texts: TypeAlias = str | Sequence[str]
"""Captions. A single caption is a batch of one."""


class ClassCondition(nn.Module):
    """Learned prefix tokens for each class, and for the null class of classifier-free guidance (arXiv 2207.12598).

    A batch of conditions is a tensor of labels, ``(B,)`` int64 in ``[0, num_classes]``; ``num_classes`` is the null
    class. Each label has ``count`` tokens of ``width``. ``row`` is None for a model that does not read captions
    (:mod:`pra.models.text`).
    """

    row: Row | None = None

    def __init__(self, num_classes: int, count: int, width: int) -> None:
        super().__init__()
        self.null, self.count = num_classes, count
        self.embedding = nn.Embedding(num_classes + 1, count * width)

    @property
    def embeddings(self) -> list[nn.Parameter]:
        """The parameters that are embeddings outside ``nn.Embedding``."""
        return []

    def forward(self, labels: Tensor) -> Tensor:
        """Return the prefix tokens ``(B, count, width)`` of labels ``(B,)``."""
        return self.embedding(labels).view(len(labels), self.count, -1)  # type: ignore[no-any-return]

    def null_like(self, labels: Tensor) -> Tensor:
        """Return one null condition for each of ``labels``."""
        return torch.full_like(labels, self.null)

    def drop(self, labels: Tensor, drawn: Tensor, probability: float) -> Tensor:
        """Replace labels by the null class where ``drawn`` ``(B,)`` in [0, 1) is below ``probability``."""
        return labels.masked_fill(drawn < probability, self.null)

    def parse(self, given: Labels | None, classes: Sequence[str], captions: Texts | None = None) -> Tensor:
        """Return labels ``(B,)`` on the CPU, from classes by number or by name.

        Raises:
            PraError: an unknown class, a number out of range, no labels, or captions.
        """
        if captions is not None:
            self.texts(captions)
        if given is None:
            raise PraError("no labels are given. Give classes by number or name", code="missing")
        asked = listed(given)
        numbers = [place_of(label, classes) if isinstance(label, str) else label for label in asked]
        labels = integers(numbers, "labels must be whole numbers of 64 bits or names of classes")
        wrong = labels[(labels < 0) | (labels > self.null)]
        if len(wrong):
            problem = f"is out of range: this model's classes are 0 to {self.null - 1}"
            raise PraError(f"label {int(wrong[0])} {problem}", value=int(wrong[0]))
        return labels

    def use(self, name: str) -> None:
        """Refuse to load a frozen text encoder: this condition does not have one."""
        raise PraError("this model has no frozen text encoder. Leave --weights out", code="conflict", name=name)

    def kept(self, text: str) -> str:
        """Return the part of a text that the model reads: nothing."""
        return ""

    def unread(self, texts: Sequence[str]) -> str:
        """Return a message if the model would cut one of the texts: always empty here."""
        return ""

    def texts(self, captions: Texts) -> list[str]:
        """Refuse captions: this condition does not read them."""
        raise PraError("this model draws classes and reads no captions. Give labels", code="unsupported")

    def file_name(self, label: int, classes: Sequence[str]) -> str:
        """Return the part of a file's name for a class, such as ``0007-cat``, or for a caption among ``classes``."""
        part = file_part(classes[label])
        return f"{label:04d}-{part}" if part else f"{label:04d}"  # an empty caption

    def rows_for(self, known: Sequence[str], classes: Sequence[str]) -> list[int]:
        """Return the rows of ``embedding`` from which other ``classes`` start, the null class last.

        A class whose name is among ``known``, the classes of this condition, keeps its row. A new class starts from the
        null class.

        Raises:
            PraError: a name that occurs in both lists occurs twice in one of them, so that its row is not clear. Equal
                lists are allowed.
        """
        if tuple(known) == tuple(classes):
            return [*range(len(known)), self.null]
        there, here = Counter(known), Counter(classes)
        twice = next((name for name in classes if there[name] and there[name] + here[name] > 2), None)
        if twice is not None:
            problem = f"{there[twice]} of the model's classes and {here[twice]} of the data are called {twice!r}"
            fix = "Rename the classes of the data to train them from scratch"
            raise PraError(f"{problem}. {fix}", code="conflict", value=twice)
        places = {name: place for place, name in enumerate(known)}
        return [*(places.get(name, self.null) for name in classes), self.null]


def place_of(name: str, classes: Sequence[str]) -> int:
    """Return the number of the class ``name``. Refuse an unknown name, and a name of several classes."""
    if name not in classes:
        raise PraError(f"no class {name!r}{nearest(name, classes)}", code="unknown", value=name)
    places = [str(place) for place, known in enumerate(classes) if known == name]
    if len(places) > 1:
        problem = f"{len(places)} classes are called {name!r}. Give one of their numbers: {', '.join(places[:9])}"
        raise PraError(problem, code="conflict", value=name)
    return int(places[0])


def listed(values: Any) -> list[Any]:
    """Return the values of a tensor, an array or an iterable as a list; a single value becomes a list of one."""
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def integers(values: Any, expected: str) -> Tensor:
    """Return whole numbers as int64 on the CPU, neither rounded nor wrapped.

    Raises:
        PraError: a value is not a whole number of 64 bits; ``expected`` begins the message.
    """
    given = listed(values)
    try:
        return torch.tensor([operator.index(value) for value in given], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = " ".join(repr(given).split())[:200]
        raise PraError(f"{expected}, got {value}", value=value) from None
