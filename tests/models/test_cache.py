"""The engine's caches: as large as they are counted, in whole buckets, behind a mask that is made once a token."""

import pytest
import torch
from support.engines import by_modules
from support.models import ALL, random_model

from pra import Sampler
from pra.config import Precision, SamplingConfig
from pra.models.cache import ALIGNED, KVCache, StaticCache
from pra.sampling import Engine, runner
from pra.sampling.native import SWITCH

GUIDED = SamplingConfig(guidance=3.0, steps=2)
LABELS, SEEDS = [0, 4, 2], [10, 11, 12]


def test_counted_bytes_are_the_bytes_held(monkeypatch):
    cases = [(name, "1", False, Precision.FLOAT32) for name in ALL]
    cases += [("learned", "0", compile, precision) for compile in (False, True) for precision in list(Precision)[1:]]
    for name, native, compile, precision in cases:
        monkeypatch.setenv(SWITCH, native)
        model, batch = random_model(ALL[name]), 3
        held = Engine(model, GUIDED, batch, precision, compile).steps.caches
        codec = model.config.codec
        assert len(held) == (2 if codec and codec.context else 1)
        total = sum(cache.keys.nbytes + cache.values.nbytes for cache in held)
        assert runner.cache_bytes(model, GUIDED, precision, compile) * batch == total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "group"), [(8, 1), (None, 1), (8, 3)])
def test_static_cache_mask_hides_tokens_not_there_yet(size, group, dtype):
    """Added to the scores: 0, and minus infinity where no token is yet; of whole buckets."""
    config = random_model().config.backbone
    cache = StaticCache(config, 2, 13, torch.device("cpu"), dtype, group, bucket=size)
    assert cache.capacity == (16 if size else 13)
    shape = 2, config.heads, group, config.width // config.heads
    growing = KVCache(config, 2, 13, torch.device("cpu"), dtype, group)
    for length in (0, 5, 7, 8, 12, 3):  # backwards, too
        growing.seek(length)
        assert growing.bound == length + group
        cache.seek(length)
        token = torch.randn(shape).to(dtype)
        keys, values, mask = cache.extend(1, token, 2 * token)
        assert mask is not None
        assert keys.shape[2] == values.shape[2] == mask.shape[3] == cache.bound
        assert length < cache.bound <= cache.capacity
        assert cache.bound % (size or cache.capacity) == 0
        assert mask.dtype is dtype
        assert torch.equal(mask.flatten() == 0, torch.arange(cache.bound) < length + group)
        assert torch.equal(mask.isneginf(), mask != 0)
        assert torch.equal(keys[:, :, length : length + group], token)
        assert torch.equal(values[:, :, length : length + group], 2 * token)


def test_static_cache_is_aligned_on_a_gpu_only(monkeypatch):
    """CUDA's kernels want a mask of such a length; elsewhere a longer cache would only be a slower one."""
    config, made = random_model().config.backbone, {name: getattr(torch, name) for name in ("empty", "zeros", "arange")}
    for name, make in made.items():
        monkeypatch.setattr(torch, name, lambda *size, make=make, device, dtype: make(*size, dtype=dtype))
    capacities = [StaticCache(config, 1, 13, torch.device(d), torch.float32).capacity for d in ("cpu", "cuda")]
    assert capacities == [13, 2 * ALIGNED]


def test_bfloat16_keeps_residual_streams_float32(monkeypatch):
    """The same holds in training and in sampling, where linear layers hold bfloat16 copies."""
    by_modules(monkeypatch)
    model, seen = random_model(), []
    blocks = [*model.head.blocks, *model.backbone.transformer.blocks, *model.codec.decoder.transformer.blocks]
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        condition = model.head.project(torch.randn(4, 32))
        assert condition.dtype is torch.bfloat16
        assert model.head(torch.randn(4, 5), torch.rand(4), condition).dtype is torch.float32
    assert len(seen) == len(model.head.blocks)
    Sampler(model, GUIDED, Precision.BFLOAT16).sample(LABELS, SEEDS)
    assert set(seen) == {(torch.float32, torch.float32)}
