"""Captions as conditions: a small transformer reads the text, and its outputs are prefix tokens after the class's."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import ImageConfig, TextConfig
from pra.errors import PraError
from pra.models.cache import Masked
from pra.models.condition import ClassCondition, Labels, Row, Texts, listed
from pra.models.transformer import Transformer, raster_positions

BYTES = 256
NGRAMS = (3, 5, 8)
"""Bytes that are hashed together: parts of words, and short words."""
PRIME = 0x9E3779B1
NOTHING = -1
"""Padding after the tokens of a text."""


@dataclass(frozen=True)
class ByteRow:
    """A function to rows ``(1 + length,)``: a class, the bytes of a text, then :data:`NOTHING`."""

    length: int

    def __call__(self, label: int, text: str) -> npt.NDArray[np.int64]:
        """Return the row of a class and a text."""
        kept = np.frombuffer(cut(text, self.length).encode(), np.uint8)
        row = np.full(1 + self.length, NOTHING, np.int64)
        row[0], row[1 : 1 + len(kept)] = label, kept
        return row


def plain(text: str) -> str:
    """Return a text as models read it: in Unicode's composed form (NFC), with single spaces between words."""
    return " ".join(unicodedata.normalize("NFC", text).encode(errors="replace").decode().split())


def cut(text: str, length: int) -> str:
    """Return the longest prefix of a :func:`plain` text with at most ``length`` bytes in UTF-8."""
    return plain(text).encode()[:length].decode(errors="ignore")


def hashed_ngrams(text: Tensor, size: int, count: int) -> Tensor:
    """Return a number in ``[0, count)`` for each byte and the ``size - 1`` before it: int64 ``(B, L)``.

    As in the Byte Latent Transformer (arXiv 2412.09871, section 3.2.1): a byte alone says little, and a small reader
    takes long to learn words from bytes.
    """
    padded = F.pad(text + 1, (size - 1, 0))
    hashed = torch.full_like(text, size)
    for offset in range(size):
        hashed = hashed * PRIME + padded[:, offset : offset + text.shape[1]]  # int64 products wrap
    return (hashed ^ (hashed >> 32)) % count


class TextCondition(ClassCondition):
    """Prefix tokens of a class and of a text, both optional.

    A batch of conditions is int64 ``(B, 1 + L)``: the class (``num_classes`` is the null class), the text's bytes in
    UTF-8, then -1. Labels ``(B,)`` are conditions without text. The class's ``count`` tokens come first. The tokens of
    the text are the outputs of learned queries, which attend to the whole text in a bidirectional transformer. The
    prefix therefore has the same length for every text, and other modules do not see padding.
    """

    row: Row
    letters: nn.Module

    def __init__(self, num_classes: int, count: int, width: int, text: TextConfig) -> None:
        super().__init__(num_classes, count, width)
        inner, self.length, self.unit = text.transformer.width, text.max_length, text.unit
        self.row = ByteRow(text.max_length)
        self.letters = nn.Embedding(BYTES, inner)
        self.ngrams = nn.Embedding(text.ngrams, inner) if text.ngrams else None
        self.place = nn.Parameter(torch.empty(text.max_length, inner))
        self.queries = nn.Parameter(torch.empty(text.tokens, inner))
        self.reader = Transformer(text.transformer, raster_positions((1, text.max_length), prefix=text.tokens))
        self.out = nn.Linear(inner, width)

    @property
    def embeddings(self) -> list[nn.Parameter]:
        """The parameters that are embeddings outside ``nn.Embedding``."""
        return [self.place, self.queries]

    def forward(self, labels: Tensor) -> Tensor:
        """Return the prefix tokens ``(B, count + tokens, width)`` of conditions ``(B, 1 + L)``."""
        rows = self.rows(labels)
        return torch.cat([super().forward(rows[:, 0]), self.read(rows[:, 1:])], dim=1)

    def read(self, text: Tensor) -> Tensor:
        """Return the tokens ``(B, tokens, width)`` of texts ``(B, L)``."""
        queries = self.queries.expand(len(text), -1, -1)
        there = torch.cat([text.new_ones(queries.shape[:2]).bool(), text != NOTHING], dim=1)
        tokens = torch.cat([queries, self.embed(text) + self.place], dim=1)
        return self.out(self.reader(tokens, Masked(there[:, None, None]))[:, : queries.shape[1]])  # type: ignore[no-any-return]

    def embed(self, text: Tensor) -> Tensor:
        """Return the reader's inputs ``(B, L, W)`` of texts ``(B, L)``; ``W`` is the reader's width."""
        letters: Tensor = self.letters(text.clamp(min=0))
        if self.ngrams is None:
            return letters
        hashed = [hashed_ngrams(text, size, self.ngrams.num_embeddings) for size in NGRAMS]
        return letters + self.ngrams(torch.stack(hashed)).sum(0)  # type: ignore[no-any-return]

    def size(self, text: str) -> int:
        """Count the bytes of a text."""
        return len(plain(text).encode())

    def kept(self, text: str) -> str:
        """Return the part of a text that the model reads."""
        return cut(text, self.length)

    def unread(self, texts: Sequence[str]) -> str:
        """Return a message if the model would cut the longest of the texts, else an empty string."""
        longest = max(map(self.size, texts), default=0)
        cut_off = f"a caption has {longest} {self.unit}, and this model reads the first {self.length}"
        return cut_off if longest > self.length else ""

    def rows(self, labels: Tensor) -> Tensor:
        """Return conditions ``(B, 1 + L)``: labels ``(B,)`` get an empty text, and conditions stay unchanged."""
        if labels.ndim == 2:
            return labels
        return torch.cat([labels[:, None], labels.new_full((len(labels), self.length), NOTHING)], dim=1)

    def null_like(self, labels: Tensor) -> Tensor:
        """Return one null condition for each of ``labels``: the null class and an empty text."""
        return self.rows(labels.new_full((len(labels),), self.null))

    def drop(self, labels: Tensor, drawn: Tensor, probability: float) -> Tensor:
        """Replace conditions by the null condition where ``drawn`` is below ``probability``.

        With several classes, the next ``probability`` of the conditions loses only the text, and half of the remaining
        ones lose only the class. The model thus learns to sample from a class alone and from a text alone. A
        probability of 0 leaves all conditions unchanged.
        """
        rows, null, drawn = self.rows(labels), self.null_like(labels), drawn.unsqueeze(1)
        whole = drawn < probability
        if self.null == 1 or not probability:
            return torch.where(whole, null, rows)
        no_text = drawn < 2 * probability
        no_class = whole | (~no_text & (drawn < 0.5 + probability))
        return torch.where(torch.cat([no_class, no_text.expand(-1, self.length)], dim=1), null, rows)

    def parse(self, given: Labels | None, classes: Sequence[str], captions: Texts | None = None) -> Tensor:
        """Return conditions ``(B, 1 + L)`` on the CPU, from classes by number or name, from texts, or from both.

        A text without a class gets the class of a model with a single class, else the null class. An empty text without
        a class is the null condition. Rows ``(B, 1 + L)`` stay unchanged. A long text is cut, with a warning.

        Raises:
            PraError: neither classes nor texts are given, their numbers differ, or a class is unknown.
        """
        if isinstance(given, Tensor) and given.ndim == 2:
            if given.shape[1] != 1 + self.length or captions is not None:
                problem = f"rows of shape {tuple(given.shape)} do not fit: this model's are (B, {1 + self.length})"
                raise PraError(f"{problem} and hold their captions. Give labels, captions or both", code="mismatch")
            return given.cpu()
        if given is None and captions is None:
            raise PraError("neither captions nor labels are given. Give at least one of them", code="missing")
        texts = None if captions is None else self.texts(captions)
        if given is None:
            assert texts is not None
            given = [0 if text and self.null == 1 else self.null for text in texts]
        labels = super().parse(given, classes)
        texts = [""] * len(labels) if texts is None else texts
        if len(texts) != len(labels):
            problem = f"{len(texts)} captions and {len(labels)} labels. Give one label per caption"
            raise PraError(problem, code="mismatch")
        rows = [self.row(label, text) for label, text in zip(labels.tolist(), texts, strict=True)]
        return torch.from_numpy(np.stack(rows)) if rows else labels.new_empty(0, 1 + self.length)

    def texts(self, given: Texts) -> list[str]:
        """Return texts as the model reads them. Warn if a text is cut."""
        texts = listed(given)
        for text in texts:
            if not isinstance(text, str):
                raise PraError(f"captions must be texts, got {text!r:.80}. Give strings", value=f"{text!r:.80}")
        if problem := self.unread(texts):
            warnings.warn(f"{problem}. Give a shorter one", stacklevel=2)
        return [self.kept(text) for text in texts]


def condition_of(config: ImageConfig, count: int, width: int) -> ClassCondition:
    """Build the condition of a model: ``count`` tokens of a class, and the tokens of a text if it is read."""
    if config.text is None:
        return ClassCondition(config.num_classes, count, width)
    if config.text.frozen is not None:
        from pra.models.frozen import FrozenTextCondition

        return FrozenTextCondition(config.num_classes, count, width, config.text, config.text.frozen)
    return TextCondition(config.num_classes, count, width, config.text)
