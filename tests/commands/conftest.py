"""Fixtures that the tests of the commands share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.answer import caller

from pra.commands import train
from pra.training import callbacks


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """A command in this process, on the CPU and in a folder of its own; a training without curves and report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    monkeypatch.setattr(train, "write_report", lambda run: None)
    return caller(capsys)


@pytest.fixture(scope="session")
def picture():
    """``picture(path)`` writes noise of 8x8 pixels, the same for names of the same length."""

    def write(path, width=8, height=8, mode="L"):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).convert(mode).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def pictures(picture):
    """``pictures("folder")`` fills a folder with a few pictures of two classes and returns the data source."""

    def write(folder, width=8, height=8, mode="L"):
        for index in range(12):
            picture(Path(folder) / ("cat", "dog")[index % 2] / f"{index}.png", width, height, mode)
        return f"folder:{folder}"

    return write
