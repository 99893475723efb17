"""Loading draws no weights to throw away, and leaves no number unset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ALL, JITS, random_jit, random_model
from torch.overrides import TorchFunctionMode

from pra import load
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
