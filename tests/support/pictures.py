"""Pictures on the disk, and what a survey of many finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pra.data.survey import Range, Survey

PHOTOS = Survey(
    source="folder:photos",
    images=20_000,
    classes={"cats": 12_000, "dogs": 8_000},
    opened=500,
    width=Range(300, 1200, 4000),
    height=Range(200, 900, 3000),
    short_side=Range(200, 900, 3000),
    grey=3,
    transparent=0,
    square=20,
    corrupt=(),
    seconds_per_image=0.0,
)


def picture(path: Path, size: tuple[int, int] = (20, 20), mode: str = "RGB", seed: int = 0) -> Path:
    """Noise, in which every pixel has a colour where the mode has any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


def flat(path: Path, colour: object, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
