"""Arithmetic and traffic, counted on a model on the meta device.

FLOPs: a multiply-add counts 2; only matrix products and attention count (``torch.utils.flop_counter``). Causal
attention counts in full in training, and by the tokens in the cache in sampling. Bytes of sampling: every matrix as
often as it is read, and the caches' keys and values as they are written and read. Activations are left out: they stay
on the chip at small batches.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pra.config import AnyModelConfig, Clean, Exact, ModelConfig, RunConfig, SamplingConfig
from pra.method import noise
from pra.method.objectives import training_losses
from pra.models import PRA, build_model
from pra.models.cache import KVCache
from pra.sampling import Steps, exact_rollout, solvers
from pra.sampling.guidance import Evaluations, Plan
from pra.sampling.whole_image import stages


@dataclass(frozen=True)
class Cost:
    """Floating point operations of one image, and bytes between memory and processor."""

    flops: int
    bytes: float


def training_flops(run: RunConfig) -> int:
    """Count one training image: every forward and backward pass of a step, without LPIPS."""
    objective = dataclasses.replace(run.train.objective, perceptual_weight=0.0)
    rollout, sequential = run.train.rollout, 0
    if run.model.autoregressive and isinstance(rollout, Exact):
        # The inputs are counted apart, then a step on given inputs.
        sequential, rollout = _rollout_flops(run.model, rollout), Clean()
    with torch.device("meta"):
        model = build_model(run.model)
        label = torch.zeros(1, dtype=torch.int64)
        image = torch.zeros(1, run.model.channels, *run.model.image_size)

        def step() -> None:
            losses = training_losses(model, image, label, noise.keys(0, label), objective, rollout)
            torch.autograd.backward(losses.total)

        return _count(step) + sequential


def sampling_flops(run: RunConfig) -> dict[str, int]:
    """Count one sampled image by part, with the run's own guidance, solver and steps."""
    if not run.model.autoregressive:
        return {"transformer": _whole_image_flops(run.model, run.sampling)}
    return {part: cost.flops for part, cost in sampling_costs(run.model, run.sampling).items()}


def sampling_costs(
    config: ModelConfig, sampling: SamplingConfig, batch: int = 1, element_size: int = 4
) -> dict[str, Cost]:
    """Count ``backbone``, ``head`` and ``decoder`` (and the deblocking filter) of one of ``batch`` images side by side,
    as the engine runs them.

    The matrices are read once for all images of a batch, the caches by each; elements have ``element_size`` bytes.
    """
    with torch.device("meta"), torch.inference_mode():
        model = PRA(config)
        steps = Steps(model, sampling, batch)
        labels, nothing = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 0, config.group_dim)
        embedding = _count(steps.reset)  # the head's work, once a batch
        tokens = model.condition(labels.repeat(steps.streams))
        told = _count(lambda: model.condition(labels.repeat(steps.streams)))  # captions are read once an image
        h = steps.begin(tokens, nothing)
        state, patch = torch.zeros(batch, 1, config.group_state_dim), torch.zeros(batch, 1, config.group_dim)
        prefill = _count(lambda: steps.begin(tokens, nothing)) - embedding

        def at(position: int, step: Callable[[], Any]) -> int:
            steps.seek(position)
            return _count(step)

        reads = _series(lambda place: at(place + 1, lambda: steps.read(patch)), config.num_groups - 1)
        counts = {
            "backbone": told + prefill + reads,
            "head": embedding + _head_flops(steps, h, state),
            "decoder": _series(lambda place: at(place, lambda: steps.write(state)), config.num_groups),
        }
        if sampling.deblock:
            patches = torch.zeros(batch, config.num_groups, config.group_dim)
            counts["decoder"] += _count(lambda: model.picture(patches))
        traffic = _traffic(steps)
    smaller = element_size / torch.float32.itemsize / batch
    return {part: Cost(count // batch, traffic[part] * smaller) for part, count in counts.items()}


def _head_flops(steps: Steps, h: Tensor, state: Tensor) -> int:
    """Count the head at all positions. Evaluations of as many streams cost the same: one of them is measured."""
    return sum(_head_flops_at(steps, at, h, state) for at in steps.evaluations.values())


def _head_flops_at(steps: Steps, at: Evaluations, h: Tensor, state: Tensor) -> int:
    head, total = steps.head, 0
    steps.seek(at.places[0])
    condition = head.project(h).view(steps.streams, steps.batch, 1, -1)
    span = None if at.plan.span is None else at.times[:1]
    for guided, positions in at.positions().items():
        streams, scale = at.plan.streams(guided), steps.scale(at.places[0])
        known = steps.modulations(condition, guided, scale)
        once = _count(lambda: head.project(h)) + _count(lambda guided=guided: steps.modulations(condition, guided))  # type: ignore[misc]
        for number, evaluations in Counter(streams).items():
            inputs = state, at.times[0], condition[:number], span, known[streams.index(number)]
            once += evaluations * _count(lambda inputs=inputs: head(*inputs))  # type: ignore[misc]
        total += positions * once
    return total


def _traffic(steps: Steps) -> dict[str, int]:
    """Count the bytes of float32 that a batch moves, by part."""
    model, head, tokens = steps.model, steps.head, steps.model.config.num_groups
    evaluated = _matrices(head.state_in, head.blocks, head.out)
    head_bytes = tokens * _matrices(head.condition_in)
    for at in steps.evaluations.values():
        head_bytes += len(at.places) * len(at.plan.times) * evaluated
        for guided, positions in at.positions().items():
            head_bytes += positions * len(at.groups[guided]) * _matrices(head.modulations, head.final_modulation)
    backbone = tokens * _matrices(model.backbone)
    backbone += _cache_traffic(steps.backbone_cache, model.backbone.prefix + 1, tokens - 1)
    decoder = tokens * _matrices(model.codec.decoder) if model.config.codec is not None else 0
    decoder += _cache_traffic(steps.decoder_cache, 1, tokens)
    if model.codec.deblock is not None and steps.config.deblock:
        decoder += _matrices(model.codec.deblock)
    return {"backbone": backbone, "head": head_bytes, "decoder": decoder}


def _matrices(*modules: Any) -> int:
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.nbytes for layer in layers)


def _cache_traffic(cache: KVCache | None, first: int, steps: int) -> int:
    """Count the bytes of ``steps`` steps, the first over ``first`` groups of tokens: all are read, one is written."""
    if cache is None:
        return 0
    return cache.nbytes // cache.capacity * cache.group * sum(seen + 1 for seen in range(first, first + steps))


def _whole_image_flops(config: AnyModelConfig, sampling: SamplingConfig) -> int:
    """Count one image at once. Evaluations of as many streams cost the same: one of them is measured."""
    total, patches = 0, config.num_patches
    with torch.device("meta"), torch.no_grad():
        model = build_model(config)
        asked = [solvers.evaluation_times(solver, times.tolist()) for solver, times in stages(sampling)]
        plans = [Plan(sampling, patches, times) for times in asked]
        for streams, evaluations in Counter(n for plan in plans for n in plan.streams(plan.most == 2)).items():
            labels = torch.zeros(streams).long()
            given = torch.zeros(streams, patches, config.patch_dim), torch.zeros(1, 1), labels, model.condition(labels)
            total += evaluations * _count(lambda given=given: model(*given))  # type: ignore[misc]
        most = max(plan.most for plan in plans)
        return total + _count(lambda: model.condition(torch.zeros(most).long()))  # captions are read once an image


def _rollout_flops(config: ModelConfig, how: Exact) -> int:
    """Count one exact rollout: each further position costs more than the one before it by the same amount."""
    with torch.device("meta"), torch.no_grad():
        model, label = PRA(config), torch.zeros(1, dtype=torch.int64)
        states, key = torch.zeros(1, config.num_groups, config.group_state_dim), noise.keys(0, label)

        def cost(length: int) -> int:
            return _count(lambda: exact_rollout(model, label, states[:, : length + 1], how, key))

        return cost(1) + _series(lambda place: cost(place + 2) - cost(place + 1), config.num_groups - 2)


def _series(cost: Callable[[int], int], count: int) -> int:
    """Sum ``cost(0)`` to ``cost(count - 1)``: costs grow linearly along the raster, so that two are measured."""
    at_first = cost(0) if count > 0 else 0
    growth = cost(1) - at_first if count > 1 else 0
    return count * at_first + growth * count * (count - 1) // 2


def _count(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
