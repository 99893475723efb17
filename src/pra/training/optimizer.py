"""Optimizers: which parameters learn, at which rates; and tensors that processes share in parts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pra.config import LearningRate, OptimizerConfig, TrainConfig
from pra.errors import PraError
from pra.models.transformer import Attention, SwiGLU

MUON_SCALE = 0.2
"""Root mean square of an AdamW step at rate 1; Muon's steps are scaled to it (arXiv 2502.16982)."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic polynomial of Muon's authors (https://kellerjordan.github.io/posts/muon)."""


NAMED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "all-but-codec": lambda name: not name.startswith("codec."),
    "shortcut": lambda name: name.startswith("shortcut."),
}
"""Sets of parameters that have a name of their own."""


def set_trainable(model: nn.Module, train: TrainConfig) -> None:
    """Make the parameters in ``train.trainable`` trainable, and freeze all others.

    Raises:
        PraError: an entry matches no parameter (the nearest names are given), or the codec is frozen in its warm-up.
    """
    names = [name for name, _ in model.named_parameters()]
    learning = {name for entry in train.trainable for name in _matching(entry, names)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    if train.codec_warmup and not codec_learns(model):
        problem = (
            f"train.codec_warmup {train.codec_warmup}: train.trainable freezes the codec, so nothing would learn. "
            "Set train.codec_warmup=0"
        )
        raise PraError(problem, code="conflict", value=train.codec_warmup)


def codec_learns(model: nn.Module) -> bool:
    """Return whether the model has a codec with a trainable parameter."""
    return any(p.requires_grad for name, p in model.named_parameters() if name.startswith("codec."))


def _matching(entry: str, names: list[str]) -> list[str]:
    wanted = NAMED.get(entry)
    found = [name for name in names if (wanted(name) if wanted else fnmatchcase(name, entry))]
    if found:
        return found
    modules = sorted({name[:end] for name in names for end, letter in enumerate(name) if letter == "."})
    known = [*NAMED, *names, *(f"{module}.*" for module in modules)]
    parts = [f"{module}.*" for module in modules if "." not in module]
    use = " or ".join(difflib.get_close_matches(entry, known, n=3) or [*NAMED, *parts])
    problem = f"train.trainable: {entry!r} matches no parameter. Use {use}"
    raise PraError(problem, code="unknown", value=entry, nearest=use)


class Optimizers:
    """One or more optimizers, each with its own parameters, used as one.

    Each group of parameters keeps its peak rate as ``initial_lr``, torch's own name for that.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
        self._owners = {p: part for part in parts for group in part.param_groups for p in group["params"]}
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    def set_rates(self, config: OptimizerConfig, step: int, total: int) -> None:
        """Set the learning rate of every group for step ``0 <= step < total``."""
        for group in self.param_groups:
            group["lr"] = learning_rate(config, step, total, group["initial_lr"])

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Remove the gradients."""
        for part in self.parts:
            part.zero_grad()

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the moments of a parameter by name, not a copy; empty before its first step and if it is frozen."""
        owner = self._owners.get(parameter)
        return {} if owner is None else owner.state[parameter]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """Return AdamW for the trainable parameters, with ``config.matrices``, if set, for the blocks' hidden matrices.

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
    if config.matrices is None:
        return Optimizers(adamw)
    matrices, muon = [p for p in learning if id(p) in hidden], config.matrices
    return Optimizers(adamw, MuonOptimizer(matrices, muon.lr, muon.momentum, config.weight_decay))


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear layers inside attention and MLPs, of every block of every part of a model.

    The other matrices are embeddings, projections into and out of a part, and modulations, which start at zero.
    """
    parts = [part for part in model.modules() if isinstance(part, Attention | SwiGLU)]
    return [layer.weight for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]


class MuonOptimizer(torch.optim.Optimizer):
    """Muon: orthogonalised Nesterov momentum, in steps of AdamW's size (https://kellerjordan.github.io/posts/muon).

    The step is that of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, with two differences so that several
    processes learn the same as one. The momentum stays sharded under FSDP2, and each matrix is gathered once a step:
    torch's class communicates in every product, and fails if a matrix has fewer rows than there are processes. CPUs
    compute in float32: bfloat16 there enlarges a rounding difference to 1 % of the step. Weight decay is decoupled, as
    in AdamW.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": matrices}], settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. All processes call this together."""
        for group in self.param_groups:
            lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
            for matrix in (parameter for parameter in group["params"] if parameter.grad is not None):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                direction = matrix.grad.lerp(average, momentum)
                if direction.is_cuda:
                    direction = direction.bfloat16()
                direction = orthogonalised(whole(direction))
                if is_sharded(matrix):
                    from torch.distributed.tensor import distribute_tensor

                    # Without communication: every process has the whole direction.
                    mesh, placements = matrix.device_mesh, matrix.placements
                    direction = distribute_tensor(direction, mesh, placements, src_data_rank=None)
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
    """Return the rate of step ``0 <= step < total``: a linear warm-up to ``peak``, then the schedule.

    ``peak`` is ``config.lr`` by default.
    """
    peak = config.lr if peak is None else peak
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule is LearningRate.CONSTANT:
        return peak * warmup
    progress = max(0.0, step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule is LearningRate.LINEAR:
        return peak * warmup * (1.0 - progress)
    return peak * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a ``DTensor``, sharded over processes. (Importing that class takes a second.)"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor that may be sharded over processes; all call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, without communication."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


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
