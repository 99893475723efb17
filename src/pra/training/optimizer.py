"""AdamW with decay on matrices only, the learning-rate schedule, and tensors of which processes have parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pra.config import LearningRate, OptimizerConfig
from pra.models import Model


def build_optimizer(model: Model, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW on what learns; weight decay on the weights of linear layers, none on embeddings, norms and biases."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of step ``0 <= step < total``: a linear warm-up, then constant or a cosine to zero."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule is LearningRate.CONSTANT:
        return config.lr * warmup
    progress = max(0.0, step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a ``DTensor``, of which each process has a part. (To import that class takes a second.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which processes may have parts; all call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(module: nn.Module, here: bool) -> dict[str, Tensor]:
    """Copies of a module's tensors on the CPU, in the processes where ``here`` says so; none in the others. All call
    this together: one tensor at a time is whole on their devices."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        full = whole(tensor)
        if here:
            tensors[name] = full.detach().to("cpu", copy=True)
    return tensors
