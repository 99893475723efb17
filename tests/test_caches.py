"""The engine's caches: as large as they are counted, in whole buckets, behind a mask that is made once a token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from models import ALL, random_model

from pra import Sampler
from pra.config import Precision, SamplingConfig
from pra.generate import Engine, engine
from pra.generate.native import SWITCH
from pra.generate.runner import ALIGNED, Runner
from pra.generate.step import transformer_step
from pra.models.head import HeadBlock

GUIDED = SamplingConfig(guidance=3.0, steps=2)
LABELS, SEEDS = [0, 4, 2], [10, 11, 12]


def in_buckets(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    """Attention looks at so many tokens at a time, or at the whole cache, as under CUDA graphs and the compiler."""

    def make(device: torch.device, compile: bool) -> Runner:
        made = Runner()
        made.bucket = size
        return made

    monkeypatch.setattr(engine, "runner", make)
    monkeypatch.setenv(SWITCH, "0")


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
@pytest.mark.parametrize("name", ALL)
def test_the_bytes_counted_are_the_bytes_held(
    name: str, precision: Precision, compile: bool, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, native)
    model, batch = random_model(ALL[name]), 3
    with torch.inference_mode():
        made = Engine(model, GUIDED, batch, precision, compile)
    held = [cache for cache in (made.backbone_cache, made.decoder_cache) if cache is not None]
    assert len(held) == (2 if name in ("learned", "encoder-without-h") else 1)
    total = sum(cache.keys.nbytes + cache.values.nbytes for cache in held)
    assert engine.cache_bytes(model, GUIDED, precision, compile) * batch == total


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
@pytest.mark.parametrize("size", [8, None])
def test_a_mask_is_what_is_added_to_the_scores(
    size: int | None, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a token, of whole buckets that the cache holds, minus infinity where no token is yet."""
    in_buckets(monkeypatch, size)
    seen: list[Any] = []

    def spy(weights: Any, x: Any, cache: Any, here: Any) -> Any:
        seen.append((cache, here.bound, here.mask, int(here.token)))
        return transformer_step(weights, x, cache, here)

    monkeypatch.setattr(engine, "transformer_step", spy)
    Sampler(random_model(), GUIDED, precision).sample(LABELS, SEEDS)
    assert len(seen) == 11 + 12  # read and written
    for cache, bound, mask, token in seen:
        capacity = cache.keys.shape[3]
        assert capacity % (size or capacity) == 0
        assert token < bound <= capacity
        assert bound % (size or capacity) == 0
        assert mask.shape == (1, 1, 1, bound)
        assert mask.dtype is cache.keys.dtype is (torch.bfloat16 if precision is Precision.BFLOAT16 else torch.float32)
        assert torch.equal(mask.flatten() == 0, torch.arange(bound) <= token)
        assert torch.equal(mask.isneginf(), mask != 0)


def test_on_a_gpu_a_whole_cache_is_as_long_as_its_kernels_want_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, as long as the sequence: 3 tokens of the class, and patches."""
    in_buckets(monkeypatch, None)
    for device, capacities in (("cuda", [2 * ALIGNED, 2 * ALIGNED]), ("cpu", [14, 12])):
        execution = engine.Execution(torch.device(device), Precision.FLOAT32, compile=True)
        caches = execution.new_caches(random_model(), 2, 1)
        assert [cache.keys.shape[3] for cache in caches if cache is not None] == capacities
        assert execution.bound(caches[0], 1) == capacities[0]


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.FLOAT32, 1e-5), (Precision.BFLOAT16, 0.05)])
@pytest.mark.parametrize("size", [8, None])
def test_buckets_leave_the_images_as_they_are(
    size: int | None, precision: Precision, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    monkeypatch.setenv(SWITCH, "0")
    exact = Sampler(model, GUIDED, precision).sample(LABELS, SEEDS)
    in_buckets(monkeypatch, size)
    torch.testing.assert_close(
        Sampler(model, GUIDED, precision).sample(LABELS, SEEDS), exact, atol=tolerance, rtol=tolerance
    )


def test_views_of_a_cache_grow_by_whole_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    in_buckets(monkeypatch, 8)
    with torch.inference_mode():
        made = Engine(random_model(), GUIDED, 1, Precision.FLOAT32)
    bounds = [made._execution.bound(made.backbone_cache, tokens) for tokens in range(1, 15)]
    assert bounds == [8] * 8 + [16] * 6  # 3 of the class and 11 patches
    assert made.backbone_cache.keys.shape[3] == 16
    assert all(b - a in (0, 8) for a, b in pairwise(bounds))


def test_the_head_s_residual_stream_is_float32_under_autocast() -> None:
    """As every transformer's is, and as the engine computes it."""
    model, seen = random_model(), []
    for block in model.head.blocks:
        assert isinstance(block, HeadBlock)
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        condition = model.head.condition(torch.randn(4, 32))
        assert condition.dtype is torch.bfloat16
        velocity = model.head(torch.randn(4, 5), torch.rand(4), condition)
    assert seen == [(torch.float32, torch.float32)] * len(model.head.blocks)
    assert velocity.dtype is torch.float32
