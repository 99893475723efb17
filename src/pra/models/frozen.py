"""Captions read by a frozen encoder of the library transformers (T5, CLIP, any AutoModel). Needs the extra `text`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pra.config import FrozenConfig, TextConfig
from pra.errors import PraError, reason_of
from pra.models.text import NOTHING, TextCondition, plain
from pra.utils.extras import import_failed

MOST_BYTES = 2**30
"""Memory for cached features."""


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        text = import_failed(f"text encoder {name!r}", "transformers", "text", error)
        raise PraError(text, code="not-installed", name=name) from None
    except Exception as error:  # transformers raises any exception on a folder that is not a model's
        fix = "Give the folder of a model and its tokenizer (--weights DIR, or model.text.frozen.name)"
        raise PraError(
            f"text encoder {name!r} cannot be opened ({reason_of(error)}). {fix}", "missing", name=name
        ) from None


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str) -> Any:
    with _explained(name):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)


@functools.lru_cache(maxsize=2)
def _network(name: str) -> nn.Module:
    """Load the text encoder of a model, in evaluation mode. Reads safetensors only, never a pickle."""
    with _explained(name):
        from transformers import AutoModel

        model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    found: nn.Module = getattr(model, "text_model", model)  # CLIP's name
    return found.eval().requires_grad_(False)


@dataclass(frozen=True)
class TokenRow:
    """A function to rows ``(1 + length,)``: a class, the tokens of a text by the encoder's tokenizer, then -1."""

    name: str
    length: int

    def tokens(self, text: str) -> list[int]:
        """Return all tokens of a text; an empty list for an empty text."""
        text = plain(text)
        found: list[int] = _tokenizer(self.name)(text, verbose=False)["input_ids"] if text else []
        return found

    def __call__(self, label: int, text: str) -> npt.NDArray[np.int64]:
        """Return the row of a class and a text."""
        kept = self.tokens(text)[: self.length]
        return np.array([label, *kept, *[NOTHING] * (self.length - len(kept))], np.int64)


class Features:
    """Features of texts by a frozen encoder, cached. They are not part of the model's weights.

    The encoder reads one text at a time, so that features do not depend on the batch. Copies share the cache.
    """

    def __init__(self, frozen: FrozenConfig) -> None:
        self.name, self.width = frozen.name, frozen.width
        self._kept: dict[bytes, Tensor] = {}

    def __deepcopy__(self, memo: object) -> Features:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Features, (FrozenConfig(name=self.name, width=self.width),)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, text: Tensor) -> Tensor:
        """Return the features ``(B, L, width)`` float32 of tokens ``(B, L)``; zeros after the end of a text."""
        features = torch.zeros(*text.shape, self.width, device=text.device)
        if text.is_meta or type(text) is not Tensor:  # no values: FLOPs or memory are being counted
            return features
        for place, row in enumerate(text.cpu()):
            tokens = row[row != NOTHING]
            if len(tokens):
                features[place, : len(tokens)] = self._of(tokens, text.device).to(text.device)
        return features

    def _of(self, tokens: Tensor, device: torch.device) -> Tensor:
        key = tokens.numpy().tobytes()
        if key not in self._kept:
            most = max(1, MOST_BYTES // (4 * self.width * 64))
            if len(self._kept) >= most:
                self._kept.clear()
            network = _network(self.name).to(device)
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                inputs = tokens.clone()[None].to(device)
                found = network(input_ids=inputs, attention_mask=torch.ones_like(inputs)).last_hidden_state[0]
            if found.shape[1] != self.width:
                problem = f"has features of width {found.shape[1]}, and model.text.frozen.width is {self.width}"
                raise PraError(f"text encoder {self.name!r} {problem}. Set it to {found.shape[1]}", "mismatch")
            self._kept[key] = found.float().cpu()
        return self._kept[key]


class FrozenTextCondition(TextCondition):
    """A :class:`TextCondition` whose reader sees the features of a frozen encoder in place of bytes.

    A batch of conditions is int64 ``(B, 1 + L)``: the class, the tokens of the encoder's tokenizer, then -1.
    """

    row: TokenRow

    def __init__(self, num_classes: int, count: int, width: int, text: TextConfig, frozen: FrozenConfig) -> None:
        super().__init__(num_classes, count, width, text)
        self.row = TokenRow(frozen.name, text.max_length)
        self.features = Features(frozen)
        self.letters = nn.Linear(frozen.width, text.transformer.width)

    def use(self, name: str) -> None:
        """Load the encoder and its tokenizer from another folder or name."""
        self.row = TokenRow(name, self.length)
        self.features = Features(FrozenConfig(name=name, width=self.features.width))

    def embed(self, text: Tensor) -> Tensor:
        """Return the reader's inputs ``(B, L, W)`` of tokens ``(B, L)``; ``W`` is the reader's width."""
        return self.letters(self.features(text))  # type: ignore[no-any-return]

    def size(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self.row.tokens(text))

    def kept(self, text: str) -> str:
        """Return the whole text: :class:`TokenRow` cuts its tokens."""
        return plain(text)
