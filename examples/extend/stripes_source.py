"""A data source, `stripes:COUNT`: drawn pictures of two classes."""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

import pra


class Stripes:
    classes = ("across", "down")

    def __init__(self, name: str, count: str) -> None:
        self.name = name
        self.labels = np.arange(int(count or 100), dtype=np.int64) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        shades = np.random.default_rng(index).integers(0, 256, (8, 1), dtype=np.uint8).repeat(8, axis=1)
        return Image.fromarray(shades if self.labels[index] == 0 else np.ascontiguousarray(shades.T))

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"


def main(run: str) -> None:
    pra.register_source("stripes", Stripes)
    settings = ["data.source=stripes:200", "model.num_classes=2"]
    pra.train(pra.config.apply_settings(pra.recipe("tiny"), settings), run)


if __name__ == "__main__":
    main(*sys.argv[1:])
