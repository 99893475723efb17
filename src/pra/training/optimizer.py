"""The optimizers, the learning-rate schedule, and tensors of which processes have parts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pra.config import LearningRate, Muon, OptimizerConfig
from pra.models.transformer import Attention, SwiGLU

MUON_SCALE = 0.2
"""Root mean square of an AdamW step at rate 1; Muon's steps are scaled to it (arXiv 2502.16982)."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial of Muon's authors (https://kellerjordan.github.io/posts/muon)."""


class Optimizers:
    """One or more optimizers, each with its own parameters, used as one.

    Each group of parameters keeps its peak rate as ``initial_lr``, torch's own name for that.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self._owners = {p: part for part in parts for group in part.param_groups for p in group["params"]}
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def set_rates(self, config: OptimizerConfig, step: int, total: int) -> None:
        """Set the learning rate of every group for step ``0 <= step < total``."""
        for group in self.param_groups:
            group["lr"] = learning_rate(config, step, total, group["initial_lr"])

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the moments of a parameter by name, not a copy; empty before its first step and if it is frozen."""
        owner = self._owners.get(parameter)
        return {} if owner is None else owner.state[parameter]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """Return AdamW for what learns; for the hidden matrices of the blocks the optimizer ``config.matrices``, if any.

    Weight decay acts on the weights of linear layers, not on embeddings, norms and biases.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    hidden = {id(weight) for weight in hidden_matrices(model)} if config.matrices else set()
    groups = [
        {"params": [p for p in learning if id(p) in linear - hidden], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if id(p) not in linear | hidden], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    matrices = [p for p in learning if id(p) in hidden]
    match config.matrices:
        case None:
            return Optimizers(adamw)
        case Muon(lr=lr, momentum=momentum):
            return Optimizers(adamw, MuonOptimizer(matrices, lr, momentum, config.weight_decay))


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear layers inside attention and MLPs, of every block of every part of a model.

    The other matrices are embeddings, projections into and out of a part, and modulations, which start at zero.
    """
    parts = [part for part in model.modules() if isinstance(part, Attention | SwiGLU)]
    return [layer.weight for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]


class MuonOptimizer(torch.optim.Optimizer):
    """Muon: orthogonalised Nesterov momentum, in steps of AdamW's size (https://kellerjordan.github.io/posts/muon).

    The step is that of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``. It differs in two ways, so that several
    processes learn what one learns. The momentum stays sharded under FSDP2, and each matrix is gathered once a step:
    torch's class communicates in every product, and fails where a matrix has fewer rows than there are processes. And
    CPUs compute in float32: bfloat16 there enlarges a difference of one rounding to 1 % of the step. Weight decay is
    decoupled, as AdamW's.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": matrices}], settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. All processes call this together."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, matrix: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum)
        if direction.is_cuda:
            direction = direction.bfloat16()
        direction = orthogonalised(whole(direction))
        if is_sharded(matrix):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = matrix.device_mesh, matrix.placements  # type: ignore[attr-defined]
            direction = distribute_tensor(direction, mesh, placements, src_data_rank=None)  # without communication
        matrix.mul_(1 - lr * weight_decay)
        matrix.add_(direction, alpha=-lr * MUON_SCALE * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the matrix with all singular values moved close to one (0.7 to 1.2), by a Newton-Schulz iteration.

    Singular values below about a thousandth of the norm need more than five ``steps``.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)  # no singular value above one
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def learning_rate(config: OptimizerConfig, step: int, total: int, peak: float | None = None) -> float:
    """Return the rate of step ``0 <= step < total``: a linear warm-up to ``peak``, then constant or a cosine to zero.

    ``peak`` is ``config.lr`` by default.
    """
    peak = config.lr if peak is None else peak
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule is LearningRate.CONSTANT:
        return peak * warmup
    progress = max(0.0, step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return peak * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a ``DTensor``, of which each process has a part. (Importing that class takes a second.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor of which processes may have parts; all call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(module: nn.Module, here: bool) -> dict[str, Tensor]:
    """Copy a module's tensors to the CPU, in the processes where ``here`` is true; the others get an empty dictionary.

    All call this together: one tensor at a time is whole on their devices.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        full = whole(tensor)
        if here:
            tensors[name] = full.detach().to("cpu", copy=True)
    return tensors
