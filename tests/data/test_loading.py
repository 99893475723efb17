"""Loading draws no weights to throw away, and leaves none unset."""

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
    """What torch takes from memory and nobody sets is not a number."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("unset_is_nan")
def test_every_number_is_loaded_and_none_drawn(name: str, half: bool, tmp_path: Path) -> None:
    model = MODELS[name]()
    assert all(p.isnan().any() for p in build_model(model.config, seed=None).parameters() if p.ndim == 2)
    weights.write_model(model, tmp_path, half)
    with Draws() as drawn:
        loaded = load(tmp_path)
    assert drawn.numbers == 0
    expected = {name: value.half().float() if half else value for name, value in model.named_parameters()}
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.named_parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in loaded.named_buffers())
    assert all(p.requires_grad and p.dtype is torch.float32 for p in loaded.parameters())


def test_initial_weights_are_drawn_once() -> None:
    """And not by torch's modules before."""
    with Draws() as drawn:
        model = build_model(ALL["learned"])
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert drawn.numbers == matrices


@pytest.mark.parametrize("config", [ALL["learned"], JITS["jit"]])
def test_without_memory_nothing_is_real(config: Any) -> None:
    with torch.device("meta"):
        model = build_model(config, seed=None)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_an_average_of_parts_is_assembled_of_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EMA, "_sharded", lambda ema: True)
    ema = EMA(random_model(), exponential(0.5))
    ema.model.classes = tuple("abcde")
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
    ema.model.backbone.next_position.zero_()  # training goes on
    assert model.backbone.next_position.any()
    del parts["backbone.next_position"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.next_position"):
        ema.assembled(parts)
