"""Arithmetic and traffic, counted on a model without memory (the meta device), not by formula.

FLOPs: a multiply-add counts 2; only matrix products and attention count (``torch.utils.flop_counter``). Causal
attention counts in full in training, and by the tokens really in the cache in sampling. Bytes of sampling: every
matrix as often as it is read, and the caches' keys and values as they are written and read; activations, which stay
on the chip at small batches, are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pra import noise
from pra.config import Clean, Exact, JiTConfig, ModelConfig, Precision, RunConfig, SamplingConfig
from pra.generate import Engine
from pra.generate.step import modulated_groups
from pra.generate.whole_image import sample_at_once
from pra.models import PRA, JiT, build_model
from pra.nn.transformer import KVCache
from pra.objectives import training_losses


@dataclass(frozen=True)
class Cost:
    """What one image takes: floating point operations, and bytes between memory and processor."""

    flops: int
    bytes: float


def training_flops(run: RunConfig) -> int:
    """FLOPs of one training image: every forward and backward pass of a step, without LPIPS."""
    objective = dataclasses.replace(run.train.objective, perceptual_weight=0.0)
    rollout, sequential = run.train.rollout, 0
    if isinstance(rollout, Exact) and isinstance(run.model, ModelConfig):
        # Sampling by the midpoint rule without guidance, and then a step on inputs that are there already.
        sequential = _rollout_flops(run.model, evaluations=2 * rollout.steps)
        rollout = Clean()
    with torch.device("meta"):
        model = build_model(run.model)
        label = torch.zeros(1, dtype=torch.int64)
        image = torch.zeros(1, run.model.channels, *run.model.image_size)

        def step() -> None:
            losses = training_losses(model, image, label, noise.keys(0, label), objective, rollout)
            torch.autograd.backward(losses.total)

        return _count(step) + sequential


def sampling_flops(run: RunConfig) -> dict[str, int]:
    """FLOPs of one sampled image by part, with the run's own guidance, solver and steps."""
    if isinstance(run.model, JiTConfig):
        return {"transformer": _whole_image_flops(run.model, run.sampling)}
    return {part: cost.flops for part, cost in sampling_costs(run.model, run.sampling).items()}


def sampling_costs(
    config: ModelConfig, sampling: SamplingConfig, batch: int = 1, element_size: int = 4
) -> dict[str, Cost]:
    """What one of ``batch`` images side by side takes: ``backbone``, ``head`` and ``decoder``, as the engine runs them.

    The matrices are read once for all images of a batch, the caches by each; an element of either has
    ``element_size`` bytes.
    """
    with torch.device("meta"), torch.inference_mode():
        engine = Engine(PRA(config), sampling, batch, Precision.FLOAT32)
        labels, nothing = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 0, config.patch_dim)
        held, tokens = engine.backbone.class_tokens, config.num_patches
        backbone = _count(lambda: engine.begin(labels, engine.starts, nothing))
        backbone += _series(lambda i: engine.read(held + i + 1, False), tokens - 1)
        head = _count(engine.refresh)  # once a batch: the embeddings of the times
        for guided, positions in engine.plan.positions().items():
            head += positions * _count(lambda guided=guided: engine.integrate(0, guided))  # type: ignore[misc]
        decoder = _series(lambda i: engine.write(i + 1, False), tokens)
    traffic = _traffic(engine, batch)
    counts = {"backbone": backbone, "head": head, "decoder": decoder}
    scale = element_size / torch.float32.itemsize / batch
    return {part: Cost(count // batch, traffic[part] * scale) for part, count in counts.items()}


def _traffic(engine: Engine, batch: int) -> dict[str, int]:
    """Bytes that a batch moves, by part."""
    tokens, head = engine.patches.shape[1], engine.head
    decoder = engine.decoder
    evaluated = len(engine.plan.times) * (head.bytes() - head.condition_in.matrix.nbytes)
    head_bytes = tokens * (evaluated + head.condition_in.matrix.nbytes)
    for guided, positions in engine.plan.positions().items():
        groups = len(list(modulated_groups(engine.plan.streams(guided), batch)))
        head_bytes += positions * groups * head.modulations.matrix.nbytes
    return {
        "backbone": tokens * engine.backbone.bytes()
        + _cache_traffic(engine.backbone_cache, engine.backbone.class_tokens + 1, tokens - 1),
        "head": head_bytes,
        "decoder": tokens * decoder.bytes() + _cache_traffic(engine.decoder_cache, 1, tokens) * decoder.context
        if decoder
        else 0,
    }


def _cache_traffic(cache: KVCache | None, first: int, steps: int) -> int:
    """Bytes of ``steps`` steps, the first of which sees ``first`` tokens: all of these are read, one is written."""
    if cache is None:
        return 0
    token = (cache.keys.nbytes + cache.values.nbytes) // cache.keys.shape[3]
    return token * sum(seen + 1 for seen in range(first, first + steps))


def _whole_image_flops(config: JiTConfig, sampling: SamplingConfig) -> int:
    """FLOPs of a JiT's image, whose last interval is Euler's."""
    with torch.device("meta"), torch.no_grad():
        model, label, key = JiT(config), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        return _count(lambda: sample_at_once(model, model, sampling, label, key))


def _rollout_flops(config: ModelConfig, evaluations: int) -> int:
    """FLOPs of one exact rollout by the plain path (:class:`pra.generate.Decoding`), without guidance."""
    with torch.device("meta"), torch.no_grad():
        model = PRA(config)
        labels, patch = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, config.patch_dim)
        state, t = torch.zeros(1, 1, config.state_dim), torch.zeros(1, 1)
        read, written = model.backbone.new_cache(1), model.codec.new_cache(1)
        h = torch.zeros(1, 1, config.backbone.width)
        condition = model.head.condition(h)
        prefill = _count(lambda: model.backbone(labels, patch[:, :0], read))
        head = _count(lambda: model.head.condition(h)) + evaluations * _count(lambda: model.head(state, t, condition))
        steps = _series(lambda i: model.backbone.step(patch, read), config.num_patches - 1)
        return (
            prefill
            + steps
            + config.num_patches * head
            + _series(lambda i: model.write(state, written), config.num_patches)
        )


def _series(step: Callable[[int], Any], count: int) -> int:
    """The cost of ``count`` steps along the raster, each dearer than the last by the same: two are measured."""
    first = _count(lambda: step(0))
    growth = _count(lambda: step(1)) - first if count > 1 else 0
    return count * first + growth * count * (count - 1) // 2


def _count(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
