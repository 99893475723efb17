"""Loading draws no weights to throw away, and leaves no number unset."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import ALL, JITS, LEARNED, random_jit, random_model
from support.refusal import refused
from torch.overrides import TorchFunctionMode

import pra
from pra import load
from pra.config import SamplingConfig, override
from pra.models import build_model, weights
from pra.training import averages
from pra.training.averages import EMA, exponential

MODELS = {name: lambda config=config: random_model(config) for name, config in ALL.items()} | {
    name: lambda config=config: random_jit(config) for name, config in JITS.items()
}


class Draws(TorchFunctionMode):
    """Counts the numbers that are drawn within."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            self.numbers += result.numel()
        return result


@pytest.fixture
def unset_is_nan() -> Iterator[None]:
    """Memory that torch allocates and nobody sets holds nan."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("unset_is_nan")
def test_load_sets_every_number_and_draws_none(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    assert all(p.isnan().any() for p in build_model(model.config, seed=None).parameters() if p.ndim == 2)
    for half in (False, True):
        folder = tmp_path / str(half)
        folder.mkdir()
        weights.write_model(model, folder, half)
        with Draws() as drawn:
            loaded = load(folder)
        assert drawn.numbers == 0
        expected = {name: p.half().float() if half else p for name, p in model.named_parameters()}
        found = dict(loaded.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert all(p.requires_grad and p.dtype is torch.float32 for p in found.values())
        buffers = dict(model.named_buffers())
        assert buffers
        assert all(torch.equal(value, buffers[name]) for name, value in loaded.named_buffers())


def test_build_model_draws_each_weight_once() -> None:
    with Draws() as drawn:
        model = build_model(ALL["learned"])
    assert drawn.numbers == sum(p.numel() for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("config", [ALL["learned"], JITS["jit"]])
def test_build_model_on_meta_needs_no_memory(config: Any) -> None:
    with torch.device("meta"):
        model = build_model(config, seed=None)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_average_of_parts_is_assembled_without_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA(random_model(), exponential(0.5))
    ema.model.classes = tuple("abcde")
    monkeypatch.setattr(averages, "is_sharded", lambda _: True)
    parts = ema.parts(here=True)
    with Draws() as drawn:
        model = ema.assembled(dict(parts))
    assert drawn.numbers == 0
    assert model is not ema.model
    assert model.classes == ema.model.classes
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, ema.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.backbone.transformer.rotary, ema.model.backbone.transformer.rotary)
    ema.model.backbone.next_position.zero_()  # as training would
    assert model.backbone.next_position.any()
    del parts["backbone.next_position"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.next_position"):
        ema.assembled(parts)


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
def test_run_of_format_1_resumes_bitwise(recipe: str, kind: str, tmp_path: Path) -> None:
    """Two steps, aged, and two more are the four steps of one run: weights, average, optimizer."""
    config = override(override(pra.recipe(recipe), "train.sample_every", "0"), "train.steps", "4")
    config = override(config, "train.checkpoint_every", "2")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pra.train(config, whole, device="cpu", progress=False)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    age(resumed / "checkpoints" / "step-00000002", kind)
    assert pra.train(config, resumed, device="cpu", progress=False).new_steps == 2
    for name in ("model", "ema", "optimizer/shard-00001-model-00001-of-00001"):
        file = Path("checkpoints", "step-00000004", f"{name}.safetensors")
        one, other = load_file(whole / file), load_file(resumed / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_model_of_format_1_loads(tmp_path: Path) -> None:
    model = random_model()
    pra.save(model, tmp_path / "model")
    age(tmp_path / "model", "PRA")
    loaded = pra.load(tmp_path / "model")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert json.loads((weights.shipped() / "config.json").read_text())["format"] == 1


def test_newer_format_is_refused(tmp_path: Path) -> None:
    pra.save(random_model(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    refused(lambda: pra.load(tmp_path / "model"), "install a newer pra", code="unreadable", path=file)


@pytest.mark.parametrize("name", JITS)
def test_saved_jit_loads_as_it_was(name: str, tmp_path: Path) -> None:
    model = random_jit(JITS[name])
    model.sampling = SamplingConfig(guidance=2.0, steps=4)
    back = pra.load(pra.save(model, tmp_path / "model"))
    assert isinstance(back, pra.JiT)
    assert (back.config, back.sampling, back.classes) == (model.config, model.sampling, model.classes)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    asked = [0, 4, 2], [10, 11, 12]
    assert torch.equal(pra.Sampler(back).sample(*asked), pra.Sampler(model).sample(*asked))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(LEARNED, class_tokens=2)
    for name, config in (("model", LEARNED), ("other", other)):
        pra.save(random_model(config), tmp_path / name)
    file = tmp_path / "model" / weights.MODEL
    shutil.copy(tmp_path / "other" / weights.MODEL, file)
    refused(lambda: pra.load(tmp_path / "model"), "6x96", "6x64", code="mismatch", path=file)
    refused(lambda: pra.save(random_model(), tmp_path / "model"), f"{tmp_path}/model exists already")
    refused(lambda: pra.load(tmp_path / "none"), code="missing", path=tmp_path / "none")
