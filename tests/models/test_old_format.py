"""Runs and models of format 1, whose class embedding lay elsewhere, load and go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pra
from pra.config import override
from pra.models import weights
from pra.training.loop import train

OLD = {"PRA": "backbone.class_embedding.", "JiT": "class_embedding."}


def age(folder: Path, kind: str) -> None:
    """Rewrite a checkpoint or model as format 1 had it, sizes in its manifest included."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 1}, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        new, old = "condition.embedding.", OLD[kind]
        renamed = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, file, metadata=_metadata(file, new, old))
    state = folder / "state.json"
    if state.exists():
        values = json.loads(state.read_text())
        values["sizes"] = {name: (folder / name).stat().st_size for name in values["sizes"]}
        state.write_text(json.dumps(values))


def _metadata(file: Path, new: str, old: str) -> dict[str, str] | None:
    """The file's own metadata, in which torch's checkpoints keep names too."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    known = header.get("__metadata__")
    return known and {key: value.replace(new, old) for key, value in known.items()}


@pytest.mark.parametrize(("recipe", "kind"), [("tiny", "PRA"), ("tiny:jit", "JiT")])
def test_run_of_format_1_goes_on_bitwise(recipe: str, kind: str, tmp_path: Path) -> None:
    config = override(override(pra.recipe(recipe), "train.sample_every", "0"), "train.steps", "4")
    train(config, tmp_path / "new", "cpu", progress=False)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    for checkpoint in weights.checkpoints(tmp_path / "old"):
        age(checkpoint, kind)
    longer = override(config, "train.steps", "6")
    models = [train(longer, tmp_path / name, "cpu", progress=False).model for name in ("new", "old")]
    for (name, one), (same, other) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert name == same
        assert torch.equal(one, other)


def test_model_of_format_1_loads(tmp_path: Path) -> None:
    model = pra.PRA(pra.recipe("tiny").model)
    pra.save(model, tmp_path / "model")
    age(tmp_path / "model", "PRA")
    loaded = pra.load(tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_newer_format_is_refused(tmp_path: Path) -> None:
    pra.save(pra.PRA(pra.recipe("tiny").model), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(pra.PraError, match="install a newer pra"):
        pra.load(tmp_path / "model")


def test_shipped_model_is_of_format_1() -> None:
    """So every test that samples it reads a file of that format."""
    assert json.loads((weights.shipped() / "config.json").read_text())["format"] == 1
