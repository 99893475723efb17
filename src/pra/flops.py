"""Arithmetic per image, counted by torch on a model without memory (the meta device), not by formula.

A multiply-add counts 2; only matrix products and attention count (``torch.utils.flop_counter``). Causal attention
counts in full in training, and by the tokens really in the cache in sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pra import noise, solvers
from pra.config import Clean, Exact, JiTConfig, ModelConfig, RunConfig
from pra.models import PRA, JiT, build_model
from pra.objectives import training_losses


def training_flops(run: RunConfig) -> int:
    """FLOPs of one training image: every forward and backward pass of a step, without LPIPS."""
    objective = dataclasses.replace(run.train.objective, perceptual_weight=0.0)
    rollout, sequential = run.train.rollout, 0
    if isinstance(rollout, Exact) and isinstance(run.model, ModelConfig):
        # Sampling by the midpoint rule without guidance, and then a step on inputs that are there already.
        sequential = sum(raster_flops(run.model, streams=1, evaluations=2 * rollout.steps).values())
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
    steps, evaluations = run.sampling.steps, solvers.EVALUATIONS[run.sampling.solver]
    streams = 2 if run.sampling.guidance != 1.0 else 1
    if isinstance(run.model, JiTConfig):  # the last interval is Euler's
        return {"transformer": ((steps - 1) * evaluations + 1) * streams * _evaluation_flops(run.model)}
    return raster_flops(run.model, streams, steps * evaluations)


def _evaluation_flops(config: JiTConfig) -> int:
    """FLOPs of one evaluation of a whole image's velocity."""
    with torch.device("meta"), torch.no_grad():
        model = JiT(config)
        x, t = torch.zeros(1, config.num_patches, config.patch_dim), torch.zeros(1, 1)
        return _count(lambda: model(x, t, torch.zeros(1, dtype=torch.int64)))


def raster_flops(config: ModelConfig, streams: int, evaluations: int) -> dict[str, int]:
    """FLOPs of one pass over the raster: ``backbone`` (``streams`` times), ``head`` and ``decoder``."""
    with torch.device("meta"), torch.no_grad():
        model = PRA(config)
        labels = torch.zeros(streams, dtype=torch.int64)
        patch = torch.zeros(streams, 1, config.patch_dim)
        state, t = torch.zeros(streams, 1, config.state_dim), torch.zeros(1, 1)
        read, written = model.backbone.new_cache(streams), model.codec.new_cache(1)
        h = torch.zeros(streams, 1, config.backbone.width)
        condition = model.head.condition(h)
        prefill = _count(lambda: model.backbone(labels, patch[:, :0], read))
        return {
            "backbone": prefill + _series(lambda: model.backbone.step(patch, read), config.num_patches - 1),
            "head": config.num_patches
            * (_count(lambda: model.head.condition(h)) + evaluations * _count(lambda: model.head(state, t, condition))),
            "decoder": _series(lambda: model.write(state[:1], written), config.num_patches),
        }


def _series(step: Callable[[], Any], count: int) -> int:
    """The cost of ``count`` steps along the raster, each dearer than the last by the same: two are measured."""
    first = _count(step)
    growth = _count(step) - first if count > 1 else 0
    return count * first + growth * count * (count - 1) // 2


def _count(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
