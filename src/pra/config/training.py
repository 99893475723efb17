"""Settings of training: rollout, objective, optimiser, precision, processes."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Annotated

from pra.config.checks import (
    Decay,
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    Share,
    nearest_multiple,
    within,
    wrong,
)
from pra.errors import PraError


@dataclass(frozen=True, kw_only=True)
class Clean(Settings):
    """Teacher forcing: the true patches."""


@dataclass(frozen=True, kw_only=True)
class Noised(Settings):
    """The true patches plus Gaussian noise of standard deviation ``sigma`` (pixels in [-1, 1])."""

    sigma: PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Reconstructed(Settings):
    """Decoded from the unperturbed states."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Settings):
    """PRA: decoded from states perturbed to ``t_i ~ U(t_min, 1)``, independently per position."""

    t_min: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class Exact(Settings):
    """Sequential: the model itself completes each state from ``t_i ~ U(t_min, t_max)``, on its own prefix.

    ``t_max = 0`` is free-running sampling. Above 0 a state starts from the part-noised true state.
    """

    t_min: Share = 0.0
    t_max: Share = 1.0
    steps: PositiveInt = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.0, self.t_max)(self.t_min, "t_min")


Rollout = Clean | Noised | Reconstructed | Parallel | Exact
"""Way to make the inputs of the AR pass (:mod:`pra.method.rollout`)."""


class PixelLoss(enum.Enum):
    """The reconstruction loss on pixels."""

    L1 = "l1"
    L2 = "l2"


class EncoderInput(enum.Enum):
    """An input of the state encoder."""

    CONDITION = "condition"
    PATCH = "patch"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Settings):
    """Loss weights and the randomness of a training step (docs/method.md).

    ``perturbed_weight`` weights the reconstruction loss on pixels decoded from perturbed states (rollout
    :class:`Parallel`). ``deblocked_weight`` weights the loss on pictures after the deblocking filter, averaged over
    both kinds of states. ``encoder_masking`` is the probability with which training hides, token by token, the input
    ``encoder_masks`` from the state encoder.

    ``noise_draws`` is the number of ``(t, eps)`` pairs per token for the flow loss; ``logit_normal_times`` draws those
    times as the sigmoid of a normal of ``time_mean`` and ``time_std`` (Stable Diffusion 3, arXiv 2403.03206), else
    uniformly. JiT has one ``(t, eps)`` per image and ignores the weights. A head with shortcuts takes
    ``shortcut_draws`` more steps per token, for the shortcut loss.
    """

    pixel_loss: PixelLoss = PixelLoss.L2
    pixel_weight: NaturalFloat = 1.0
    perceptual_weight: NaturalFloat = 0.0
    perturbed_weight: NaturalFloat = 0.0
    deblocked_weight: NaturalFloat = 1.0
    auxiliary_weight: NaturalFloat = 0.1
    noise_draws: PositiveInt = 4
    shortcut_draws: PositiveInt = 2
    logit_normal_times: bool = True
    time_mean: Annotated[float, within(-10, 10)] = 0.0
    time_std: PositiveFloat = 1.0
    class_dropout: Share = 0.1
    encoder_masking: Share = 0.0
    encoder_masks: EncoderInput = EncoderInput.CONDITION

    def weight(self, term: str) -> float:
        """Return the factor of a term in the total loss: the field ``TERM_weight``, or 1 without such a field."""
        return float(getattr(self, f"{term}_weight", 1.0))


class LearningRate(enum.Enum):
    """The learning rate after warm-up: constant, or down to zero at the last step."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True, kw_only=True)
class Muon(Settings):
    """Muon (:class:`pra.training.optimizer.MuonOptimizer`). Its peak rate ``lr`` is on the scale of AdamW's."""

    lr: PositiveFloat = 5e-3
    momentum: Decay = 0.95


MatrixOptimizer = Muon | None
"""The optimizer of the blocks' hidden matrices; None is AdamW, as for all other parameters."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW, and optionally another optimizer for the hidden ``matrices`` of the model's blocks.

    All share the warm-up, the schedule and the weight decay, which acts on matrices only. ``clip`` bounds the norm of
    the whole gradient.
    """

    lr: PositiveFloat = 3e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: NaturalFloat = 0.1
    warmup_steps: NaturalInt = 100
    schedule: LearningRate = LearningRate.CONSTANT
    clip: PositiveFloat = 1.0
    ema_decay: Share = 0.9999
    matrices: MatrixOptimizer = None

    def slower(self, divisor: float) -> OptimizerConfig:
        """Return a copy with every rate divided by ``divisor``."""
        matrices = self.matrices and replace(self.matrices, lr=self.matrices.lr / divisor)
        return replace(self, lr=self.lr / divisor, matrices=matrices)

    def rates(self) -> str:
        """``0.002``, or ``0.002 (Muon on the blocks' matrices: 0.005)``: the peak rates, for reports."""
        if self.matrices is None:
            return f"{self.lr:g}"
        return f"{self.lr:g} ({type(self.matrices).__name__} on the blocks' matrices: {self.matrices.lr:g})"


SHORTEST_AVERAGE, LONGEST_AVERAGE = 0.001, 0.28
"""Relative lengths of power-function averages. A plain mean of all steps has sqrt(1 / 12) = 0.289."""


def check_length(length: float, where: str = "averages") -> None:
    """Check that the relative length of a power-function average is in range."""
    if not SHORTEST_AVERAGE <= length <= LONGEST_AVERAGE:
        problem = "is out of range for the relative length of an average. Use one in"
        raise wrong(where, length, f"{problem} [{SHORTEST_AVERAGE}, {LONGEST_AVERAGE}], such as 0.05", "invalid")


class Precision(enum.Enum):
    """Arithmetic of the training step: ``auto`` is bfloat16 autocast on CUDA and float32 elsewhere."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Parallelism(enum.Enum):
    """Way that several processes share a step: each with the whole model (DDP), or with a part of it (FSDP2)."""

    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The training loop. ``batch_size`` is the global batch, which all processes share. A process takes at most
    ``micro_batch_size`` images at a time (accumulation).

    ``parallel`` is for several processes. ``activation_checkpointing`` computes the insides of each block a second time
    in the backward pass rather than keep them: less memory, about a third more arithmetic. ``compile`` lets torch fuse
    the step's arithmetic, the whole loss in one process, and block by block in several. It takes a minute at the start
    and makes steps faster; on CPUs it needs a C++ compiler. For the first ``codec_warmup`` steps the codec's terms are
    the only loss.

    ``trainable`` names the parameters that learn; all others keep their weights. Each entry is ``all``, ``shortcut``
    (the second head), ``all-but-codec``, or a pattern of names such as ``head.*`` (:mod:`pra.training.optimizer`).

    ``averages`` are the relative lengths of power-function averages to keep beside the exponential one
    (:mod:`pra.training.averages`), such as ``(0.05, 0.1)``: the standard deviation of an averaging profile as a part of
    the training so far. Each takes the memory and the disk of one more copy of the weights.

    Intervals are in steps. ``sample_every=0`` draws no grids. Every ``validate_every`` steps, and after the last, the
    loss is measured on the held-out images of ``data.validation``; 0 is never. The newest ``keep_checkpoints`` stay.
    Checkpoints of every ``keep_every`` steps, a multiple of ``checkpoint_every``, stay for good; 0 keeps only the
    newest.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    seed: Annotated[int, within(0, 2**63 - 1)] = 0
    rollout: Rollout = Parallel()
    codec_warmup: NaturalInt = 0
    trainable: tuple[str, ...] = ("all",)
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    averages: tuple[Annotated[float, check_length], ...] = ()
    precision: Precision = Precision.AUTO
    compile: bool = False
    parallel: Parallelism = Parallelism.DDP
    activation_checkpointing: bool = False
    log_every: PositiveInt = 20
    sample_every: NaturalInt = 500
    validate_every: NaturalInt = 0
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: Annotated[int, within(1)] = 2
    keep_every: NaturalInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.averages)) < len(self.averages):
            raise wrong("averages", list(self.averages), "has a length twice. Give each length once")
        if not self.trainable:
            raise PraError("trainable: the list is empty. Name what learns, such as all or head.*", name="trainable")
        if self.keep_every % self.checkpoint_every:
            nearest = nearest_multiple(self.keep_every, self.checkpoint_every)
            problem = f"is not a multiple of checkpoint_every {self.checkpoint_every}. Use the nearest, {nearest}"
            raise wrong("keep_every", self.keep_every, problem)
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise self._indivisible(micro, f"is not divisible by micro_batch_size {micro}; the nearest that is")

    def _indivisible(self, unit: int, problem: str) -> PraError:
        return wrong("batch_size", self.batch_size, f"{problem} is {nearest_multiple(self.batch_size, unit)}")

    def validates(self, step: int) -> bool:
        """Return whether the held-out loss is measured after ``step`` steps."""
        return self.validate_every > 0 and (step % self.validate_every == 0 or step == self.steps)

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Return the images that each process takes at a time, and how many times in a step."""
        micro = self.micro_batch_size
        split = micro is not None and micro * processes < self.batch_size
        unit = micro * processes if split and micro is not None else processes
        if self.batch_size % unit:
            parts = f" in micro batches of {micro}" if split else ""
            raise self._indivisible(unit, f"does not divide among {processes} processes{parts}; the nearest that does")
        local = self.batch_size // processes
        return (micro, local // micro) if split and micro is not None else (local, 1)
