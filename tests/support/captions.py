"""Digits with captions, as a source of one class or of ten; and the settings of a small model that reads them."""

import numpy as np

from pra.config import TextConfig, TransformerConfig
from pra.data import open_source
from pra.data.images import Labelled
from pra.data.source import register_source

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT = TextConfig(max_length=16, tokens=3, transformer=TransformerConfig(depth=1, width=16, heads=2))
SETTINGS = (
    "data.source=spoken",
    "model.num_classes=1",
    'model.text={"max_length": 16, "tokens": 3, "transformer": {"depth": 1, "width": 16, "heads": 2}}',
)
"""Settings of a run that reads captions."""


class Spoken(Labelled):
    """Digits in one class, or (``spoken:ten``) in their ten, each with two captions."""

    def __init__(self, name, classes):
        self._digits = open_source("digits")
        labels = self._digits.labels
        super().__init__(name, WORDS if classes == "ten" else ("image",), labels if classes else np.zeros_like(labels))

    def image(self, index):
        return self._digits.image(index)

    def captions(self, index):
        label = self._digits.labels[index]
        return f"a {WORDS[label]}", f"the digit {label}"


register_source("spoken", Spoken)
