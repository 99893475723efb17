"""AdamW with decay on matrices only, the learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from pra.config import LearningRate, OptimizerConfig
from pra.models import Model, build_model


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
        torch._foreach_lerp_(_local(self.model), _local(model), 1.0 - decay)

    def whole(self) -> Model:
        """The average as a model to sample from: itself, or gathered where processes have parts of it. All call this
        together."""
        return self.assembled(self.parts(here=True))

    def parts(self, here: bool) -> dict[str, Tensor]:
        """What :meth:`assembled` needs, in the processes where ``here`` says so. All call this together."""
        return gathered(self.model, here) if self._sharded() else {}

    def assembled(self, parts: dict[str, Tensor]) -> Model:
        """The average as a model to sample from, of its :meth:`parts`. No other process is waited for."""
        if not self._sharded():
            return self.model
        model = build_model(self.model.config, seed=None)
        model.load_state_dict(parts, assign=True)
        model.sampling, model.classes = self.model.sampling, self.model.classes
        return model.to(self.model.device).eval().requires_grad_(False)

    def _sharded(self) -> bool:
        return any(map(is_sharded, self.model.parameters()))


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


def _local(model: Model) -> list[Tensor]:
    """This process's part of each parameter: the same part in every model that is sharded alike."""
    return [p.to_local() if is_sharded(p) else p for p in model.parameters()]  # type: ignore[attr-defined]
