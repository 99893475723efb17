"""What the tests of the demo share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.models import random_model

import pra
from pra.config import DataConfig, Fit
from pra.demo.exhibit import Exhibit
from pra.demo.generation import Request
from pra.models import Model


@pytest.fixture(scope="session")
def exhibit() -> Callable[..., Exhibit]:
    """``exhibit(model, "name")``; by default a random model."""

    def make(model: Model | None = None, name: str = "one", fit: Fit = Fit.CENTER_CROP) -> Exhibit:
        config = replace(pra.recipe("tiny"), data=DataConfig(source="digits", fit=fit))
        return Exhibit(name, Path(name), None, config, model or random_model())

    return make


@pytest.fixture(scope="session")
def asked() -> Callable[..., Request]:
    """``asked(seed=3)``: a request, changed."""

    def make(**changes: Any) -> Request:
        return Request(**{"label": 1, "seed": 5, "count": 3, "guidance": 1.5, "steps": 2, **changes})

    return make


@pytest.fixture(scope="session")
def saved() -> Callable[..., Path]:
    """``saved(path, (width, height), mode)`` writes a picture."""

    def write(path: Path, size: tuple[int, int], mode: str = "RGB", **options: Any) -> Path:
        Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)
        return path

    return write
