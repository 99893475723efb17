"""Settings of training: objective, optimiser, precision, processes."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from pra.config.checks import between, coerce, divisors, nearest_multiple, nearest_of, positive
from pra.config.rollout import Parallel, Rollout
from pra.errors import PraError


class PixelLoss(enum.Enum):
    """The reconstruction loss on pixels."""

    L1 = "l1"
    L2 = "l2"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Loss weights and the randomness of a training step (docs/method.md).

    ``noise_draws`` is the number of ``(t, eps)`` pairs per token for the flow loss; ``logit_normal_times`` draws those
    times as the sigmoid of a normal of ``time_mean`` and ``time_std`` (Stable Diffusion 3, arXiv 2403.03206), else
    uniformly. JiT has one ``(t, eps)`` per image, and of the weights none. A head with shortcuts takes
    ``shortcut_draws`` steps per token more, for the shortcut loss.
    """

    pixel_loss: PixelLoss = PixelLoss.L2
    perceptual_weight: float = 0.0
    auxiliary_weight: float = 0.1
    noise_draws: int = 4
    shortcut_draws: int = 2
    logit_normal_times: bool = True
    time_mean: float = 0.0
    time_std: float = 1.0
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "noise_draws", "shortcut_draws", "time_std")
        between(self, "time_mean", -10.0, 10.0)
        between(self, "perceptual_weight", 0.0, math.inf)
        between(self, "auxiliary_weight", 0.0, math.inf)
        between(self, "class_dropout", 0.0, 1.0)

    def weight(self, term: str) -> float:
        """Return the factor of a term in the total loss: the field ``TERM_weight``, or 1 where there is none."""
        return float(getattr(self, f"{term}_weight", 1.0))


class LearningRate(enum.Enum):
    """The learning rate after warm-up: constant, or a cosine to zero at the last step."""

    CONSTANT = "constant"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon (:class:`pra.training.optimizer.MuonOptimizer`). Its peak rate ``lr`` is on the scale of AdamW's."""

    lr: float = 5e-3
    momentum: float = 0.95

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "lr")
        if not 0 <= self.momentum < 1:
            raise PraError(f"momentum must lie in [0, 1), got {self.momentum}")


MatrixOptimizer = Muon | None
"""The optimizer of the blocks' hidden matrices; None is AdamW, as for all other parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and perhaps another optimizer for the hidden ``matrices`` of the model's blocks.

    All share the warm-up, the schedule and the weight decay, which acts on matrices only. ``clip`` bounds the norm of
    the whole gradient.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_steps: int = 100
    schedule: LearningRate = LearningRate.CONSTANT
    clip: float = 1.0
    ema_decay: float = 0.9999
    matrices: MatrixOptimizer = None

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "lr", "clip")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise PraError(f"betas must lie in [0, 1), got {self.betas}")
        between(self, "weight_decay", 0.0, math.inf)
        between(self, "warmup_steps", 0, math.inf)
        between(self, "ema_decay", 0.0, 1.0)

    def slower(self, divisor: float) -> OptimizerConfig:
        """The same with every rate divided by ``divisor``."""
        matrices = self.matrices and replace(self.matrices, lr=self.matrices.lr / divisor)
        return replace(self, lr=self.lr / divisor, matrices=matrices)

    def rates(self) -> str:
        """``0.002``, or ``0.002 (Muon on the blocks' matrices: 0.005)``: the peak rates, for reports."""
        if self.matrices is None:
            return f"{self.lr:g}"
        return f"{self.lr:g} ({type(self.matrices).__name__} on the blocks' matrices: {self.matrices.lr:g})"


SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.001, 0.28
"""Relative lengths of power-function averages. A plain mean of all steps has sqrt(1 / 12) = 0.289."""


def check_length(length: float) -> None:
    """Whether this can be the relative length of a power-function average.

    Raises:
        PraError: it cannot.
    """
    if not SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE:
        raise PraError(
            f"an average of relative length {length:g} is out of range. Use one in [{SHORTEST_AVERAGE}, "
            f"{LONGEST_AVERAGE}], such as 0.05 or 0.1"
        )


class Precision(enum.Enum):
    """Arithmetic of the training step: ``auto`` is bfloat16 autocast on CUDA and float32 elsewhere."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Parallelism(enum.Enum):
    """How several processes share a step: each with the whole model (DDP), or with a part of it (FSDP2)."""

    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop. ``batch_size`` is the global batch, which all processes share; of its part a process takes at
    most ``micro_batch_size`` images at a time (accumulation).

    ``parallel`` is for several processes and means nothing to one. ``activation_checkpointing`` computes the insides of
    each block a second time in the backward pass rather than keep them: less memory, about a third more arithmetic.

    For the first ``codec_warmup`` steps the codec's terms are the only loss (for the ablation: everything is trained
    together in the paper). ``compile`` has torch fuse the step's arithmetic: a minute at the start for a faster step
    (on CPUs it needs a C++ compiler); the whole loss in one process, block by block in several.

    ``trainable`` names the parameters that learn; all others keep their weights. Each entry is ``all``, ``shortcut``
    (the second head), ``all-but-codec``, or a pattern of names such as ``head.*`` (:mod:`pra.training.trainable`).

    ``averages`` are the relative lengths of power-function averages to keep beside the exponential one
    (:mod:`pra.training.averages`), such as ``(0.05, 0.1)``: the standard deviation of an averaging profile as a part of
    the training so far. Each takes the memory and the disk of one more copy of the weights.

    Intervals are in steps. ``sample_every=0`` draws no grids. Every ``validate_every`` steps, and after the last, the
    loss is measured on the held-out images of ``data.validation``; 0 is never. The newest ``keep_checkpoints`` stay,
    and beside them for good those of every ``keep_every`` steps, a multiple of ``checkpoint_every``; 0 is none.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    rollout: Rollout = Parallel()  # noqa: RUF009  (frozen)
    codec_warmup: int = 0
    trainable: tuple[str, ...] = ("all",)
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    averages: tuple[float, ...] = ()
    precision: Precision = Precision.AUTO
    compile: bool = False
    parallel: Parallelism = Parallelism.DDP
    activation_checkpointing: bool = False
    log_every: int = 20
    sample_every: int = 500
    validate_every: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "steps", "batch_size", "log_every", "checkpoint_every")
        for length in self.averages:
            check_length(length)
        if len(set(self.averages)) < len(self.averages):
            raise PraError(f"averages {list(self.averages)}: a length is there twice. Give each length once")
        between(self, "sample_every", 0, math.inf)
        between(self, "validate_every", 0, math.inf)
        between(self, "codec_warmup", 0, math.inf)
        between(self, "seed", 0, 2**63 - 1)
        between(self, "keep_checkpoints", 1, math.inf)
        between(self, "keep_every", 0, math.inf)
        if not self.trainable:
            raise PraError("trainable: the list is empty. Name what learns, such as all or head.*")
        if self.keep_every % self.checkpoint_every:
            raise PraError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}: at such "
                "steps there is no checkpoint to keep; the nearest is "
                f"{nearest_multiple(self.keep_every, self.checkpoint_every)}"
            )
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise PraError(
                f"batch_size {self.batch_size} is not divisible by micro_batch_size {micro}; the nearest that divides "
                f"it is {nearest_of(divisors(self.batch_size), micro)}"
            )

    def validates(self, step: int) -> bool:
        """Return whether the held-out loss is measured after ``step`` steps."""
        return self.validate_every > 0 and (step % self.validate_every == 0 or step == self.steps)

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Images that each of so many processes takes at a time, and how many times in a step.

        Raises:
            PraError: the batch does not divide; the nearest that does is named.
        """
        micro = self.micro_batch_size
        split = micro is not None and micro * processes < self.batch_size
        unit = micro * processes if split and micro is not None else processes
        if self.batch_size % unit:
            parts = f" in micro batches of {micro}" if split else ""
            raise PraError(
                f"batch_size {self.batch_size} does not divide among {processes} processes{parts}; the nearest that "
                f"does is {nearest_multiple(self.batch_size, unit)}, or take another number of processes"
            )
        local = self.batch_size // processes
        return (micro, local // micro) if split and micro is not None else (local, 1)
