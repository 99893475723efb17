"""Fixtures that the tests of the demo share."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from support.models import random_model

import pra
from pra.config import DataConfig, Fit
from pra.demo.exhibit import Exhibit
from pra.demo.generation import Request


@pytest.fixture(scope="session")
def exhibit():
    """``exhibit(model, "name")``; by default a random model."""

    def make(model=None, name="one", fit=Fit.CENTER_CROP):
        config = replace(pra.recipe("tiny"), data=DataConfig(source="digits", fit=fit))
        return Exhibit(name, Path(name), None, config, model or random_model())

    return make


@pytest.fixture(scope="session")
def asked():
    """``asked(seed=3)``: a request, changed."""
    return functools.partial(Request, label=1, seed=5, count=3, guidance=1.5, steps=2)


@pytest.fixture(scope="session")
def saved():
    """``saved(path, (width, height), mode)`` writes a picture."""

    def write(path, size, mode="RGB", **options):
        Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)
        return path

    return write
