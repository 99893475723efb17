"""Models that are exported with settings of the sampler."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import random_model
from support.refusal import refused

import pra
from pra.commands.share import export_command
from pra.sharing.push import export


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return pra.save(random_model(), tmp_path / "model")


def test_an_exported_model_is_sampled_as_it_was_told(model: Path, tmp_path: Path) -> None:
    export_command(model, tmp_path / "told", settings=("sampling.guidance=2.5", "sampling.guidance_interval=[0, 0.8]"))
    told = pra.load(tmp_path / "told").sampling
    assert (told.guidance, told.guidance_interval) == (2.5, (0.0, 0.8))
    assert told.steps == pra.load(model).sampling.steps
    assert "guidance 2.5 (constant)" in (tmp_path / "told/README.md").read_text()
    refused(lambda: export(tmp_path / "told", tmp_path / "again", sampling={"guidance": 1.0}), "has a card already")
    for settings, words in (
        (("guidance=2",), "settings of the sampler"),
        (("data.fit=pad",), "settings of the sampler"),
        (("sampling.guidance",), "settings of the sampler"),
        (("sampling.guidanse=2",), "did you mean 'guidance'"),
        (("sampling.solver=shortcut", "sampling.steps=4"), "second head"),
    ):
        refused(lambda given=settings: export_command(model, tmp_path / "none", settings=given), words)
    assert not (tmp_path / "none").exists()
