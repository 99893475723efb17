"""AdamW with decay on matrices only, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from pra.config import LearningRate, OptimizerConfig
from pra.models import Model


def build_optimizer(model: Model, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on the weights of linear layers, none on embeddings, norms and biases."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of step ``0 <= step < total``: a linear warm-up, then constant or a cosine to zero."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule is LearningRate.CONSTANT:
        return config.lr * warmup
    progress = max(0.0, step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


class EMA:
    """The exponential moving average of a model's weights, itself a model (``.model``) that can be sampled."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """After step ``step`` (from 0). Early on the average is short, ``(1 + step) / (10 + step)``, so that the
        initial weights fade."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
