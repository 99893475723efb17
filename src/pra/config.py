"""Every setting of a run, as frozen dataclasses that check themselves. Standard library only.

A configuration is a value: build one with a recipe, change it with :func:`dataclasses.replace` or
:func:`override`, write it with :func:`to_dict`, read it back with :func:`from_dict`. Names follow the paper
(arXiv 2606.27978) and the field: patch, state, guidance scale, EMA.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, Union

from pra.errors import PraError, nearest


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise PraError(f"{name} must be positive and finite, got {getattr(config, name)}")


def _between(config: Any, name: str, low: float, high: float) -> None:
    if not low <= getattr(config, name) <= high:
        raise PraError(f"{name} must lie in [{low:g}, {high:g}], got {getattr(config, name)}")


# --- the model ----------------------------------------------------------------------------------------------


class Prediction(enum.Enum):
    """What the head's last layer predicts; either way it is trained as, and integrated as, a velocity."""

    VELOCITY = "velocity"
    DATA = "data"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A pre-norm transformer. ``width`` is a multiple of ``heads``, and ``width / heads`` of 4 (2-D RoPE)."""

    depth: int
    width: int
    heads: int

    def __post_init__(self) -> None:
        _positive(self, "depth", "width", "heads")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise PraError(
                f"width {self.width} with {self.heads} heads: width / heads must be a whole multiple of 4 "
                f"(2-D rotary embedding); try heads={max(1, self.width // 64)} or a width of {64 * self.heads}"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The flow-matching head: ``depth`` residual MLP blocks that share ``modulations`` AdaLN projections.

    With ``shortcut`` a second head of the same sizes learns steps of its flow (shortcut models, arXiv 2410.12557): told
    how long a step is, it gives the mean velocity over it, for sampling in few evaluations (``Solver.SHORTCUT``).
    """

    depth: int
    width: int
    modulations: int = 2
    prediction: Prediction = Prediction.VELOCITY
    shortcut: bool = False

    def __post_init__(self) -> None:
        _positive(self, "depth", "width", "modulations")
        if self.depth % self.modulations:
            raise PraError(
                f"head depth {self.depth} is not divisible by modulations {self.modulations}: "
                "each AdaLN projection serves the same number of consecutive blocks"
            )
        if self.shortcut and self.prediction is not Prediction.VELOCITY:
            raise PraError(
                "a head with shortcut gives mean velocities: its prediction must be velocity, not "
                f"{self.prediction.value}"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The state encoder ``G``: a residual MLP on each patch, with the condition ``h_i`` beside it or not."""

    depth: int
    width: int
    sees_condition: bool = True

    def __post_init__(self) -> None:
        _positive(self, "depth", "width")


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Learned states: the encoder ``G``, the ``state_dim`` numbers between, and the pixel decoder ``D``.

    Without ``context`` the decoder writes each patch from its own state alone (for the ablation: PRA's reads all
    states so far).
    """

    state_dim: int
    encoder: EncoderConfig
    decoder: TransformerConfig
    context: bool = True

    def __post_init__(self) -> None:
        if self.state_dim < 3:
            raise PraError(
                f"state_dim {self.state_dim} is below 3: LayerNorm takes two degrees of freedom from a state, "
                "so that fewer than 3 numbers cannot vary continuously"
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What every model's configuration begins with: the images, their patches and their classes.

    ``num_classes`` counts the real classes; the null class that guidance needs comes on top.
    """

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    num_classes: int

    def __post_init__(self) -> None:
        _positive(self, "channels", "patch_size", "num_classes")
        for side in self.image_size:
            if side < 1 or side % self.patch_size:
                raise PraError(
                    f"image_size {self.image_size[0]}x{self.image_size[1]} is not divisible by patch_size "
                    f"{self.patch_size}; the nearest sizes are multiples of {self.patch_size}"
                )
        if self.num_patches < 2:
            raise PraError(
                f"image_size {self.image_size[0]}x{self.image_size[1]} is a single patch of {self.patch_size}: "
                "a model of patches needs at least two; take a smaller patch_size"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row, ``(H / p, W / p)``."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """``N``, the length of the sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """``P = p * p * C``, numbers in one patch."""
        return self.patch_size**2 * self.channels

    @property
    def state_dim(self) -> int:
        """``d``, numbers that are generated per patch: its pixels, unless there is a codec."""
        return self.patch_dim

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ImageConfig):
    """The whole autoregressive model. ``codec=None`` is the identity codec: the patch itself is the state."""

    backbone: TransformerConfig
    head: HeadConfig
    codec: CodecConfig | None
    class_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "class_tokens")

    @property
    def state_dim(self) -> int:
        """``d``, numbers that the head generates per patch."""
        return self.codec.state_dim if self.codec else self.patch_dim


@dataclass(frozen=True, kw_only=True)
class JiTConfig(ImageConfig):
    """The diffusion baseline JiT (arXiv 2511.13720): one bidirectional transformer over all patches at once.

    ``class_tokens`` of the class stand before the patches, beside its modulation of every block; 0 is none.
    ``bottleneck`` embeds a patch through that many numbers (the paper's low-rank embedding); None is a plain matrix.
    """

    transformer: TransformerConfig
    class_tokens: int = 4
    bottleneck: int | None = None

    codec: ClassVar[None] = None
    """It writes pixels directly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(self, "class_tokens", 0, math.inf)
        if self.bottleneck is not None:
            _positive(self, "bottleneck")


AnyModelConfig = ModelConfig | JiTConfig


# --- how the inputs of the AR pass are made (pra.rollout) ---------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Teacher forcing: the true patches."""


@dataclass(frozen=True, kw_only=True)
class Noised:
    """The true patches plus Gaussian noise of standard deviation ``sigma`` (pixels in [-1, 1])."""

    sigma: float

    def __post_init__(self) -> None:
        _positive(self, "sigma")


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """Decoded from the unperturbed states."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """PRA: decoded from states perturbed to ``t_i ~ U(t_min, 1)``, independently per position."""

    t_min: float = 0.0

    def __post_init__(self) -> None:
        _between(self, "t_min", 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Sequential: the model itself completes each state from ``t_i ~ U(t_min, t_max)``, on its own prefix.

    ``t_max = 0`` is free-running sampling. Above 0 a state starts from the part-noised true one, which keeps
    the rollout tied to the image whose states are the training targets.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    steps: int = 4

    def __post_init__(self) -> None:
        _positive(self, "steps")
        _between(self, "t_max", 0.0, 1.0)
        _between(self, "t_min", 0.0, self.t_max)


Rollout = Clean | Noised | Reconstructed | Parallel | Exact

# --- sampling -----------------------------------------------------------------------------------------------


class GuidanceSchedule(enum.Enum):
    """The guidance scale along the raster: the same everywhere, or rising linearly from 1."""

    CONSTANT = "constant"
    LINEAR = "linear"


class Solver(enum.Enum):
    """How the head's ODE (or, for Euler-Maruyama, SDE) is integrated; see :mod:`pra.solvers`."""

    EULER = "euler"
    MIDPOINT = "midpoint"
    HEUN = "heun"
    EULER_MARUYAMA = "euler-maruyama"
    ADAMS_BASHFORTH = "adams-bashforth"
    DPM = "dpm"
    SHORTCUT = "shortcut"


SHORTCUT_STEPS = (1, 2, 4, 8)
"""Into how many equal steps a head with shortcuts learns to take the path."""


class TimeGrid(enum.Enum):
    """Where the solver's intervals lie between noise (0) and data (1); see :func:`pra.solvers.time_grid`."""

    UNIFORM = "uniform"
    COSINE = "cosine"
    LOGIT_NORMAL = "logit-normal"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an image is sampled. ``guidance`` 1 is none; ``steps`` counts solver intervals, not evaluations.

    Guidance acts at flow times within ``guidance_interval`` (0 is noise, 1 data; both ends belong to it), elsewhere
    there is none (arXiv 2404.07724). ``shift`` beyond 1 moves the times of the grid towards noise (arXiv 2403.03206).
    ``times`` are a grid of one's own in place of both, ``steps + 1`` of them (:mod:`pra.generate.learnt_grid`).
    """

    guidance: float = 1.0
    schedule: GuidanceSchedule = GuidanceSchedule.CONSTANT
    solver: Solver = Solver.MIDPOINT
    steps: int = 3
    temperature: float = 1.0
    renormalise: bool = True
    time_grid: TimeGrid = TimeGrid.UNIFORM
    shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _positive(self, "steps", "shift")
        _between(self, "guidance", 0.0, math.inf)
        _between(self, "temperature", 0.0, math.inf)
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise PraError(f"guidance_interval must be two times 0 <= low <= high <= 1, got {low:g} and {high:g}")
        if self.times is not None:
            self._check_times(self.times)

    def with_steps(self, steps: int) -> SamplingConfig:
        """The same in another number of steps; ``times`` are of one number of them, and go with it."""
        return dataclasses.replace(self, steps=steps, times=self.times if steps == self.steps else None)

    def _check_times(self, times: tuple[float, ...]) -> None:
        rising = all(low < high for low, high in itertools.pairwise(times))
        if len(times) != self.steps + 1 or not rising or (times[0], times[-1]) != (0.0, 1.0):
            given = ",".join(f"{t:g}" for t in times)
            raise PraError(f"times must be steps + 1 = {self.steps + 1} numbers rising from 0 to 1, got {given}")
        if self.time_grid is not TimeGrid.UNIFORM or self.shift != 1.0:
            raise PraError(
                f"times are the grid themselves: leave out time_grid {self.time_grid.value} and shift {self.shift:g}"
            )


# --- data ---------------------------------------------------------------------------------------------------


class Fit(enum.Enum):
    """How an image comes to the model's size: scaled and centre-cropped as in ADM, randomly cropped, padded."""

    CENTER_CROP = "center-crop"
    RANDOM_CROP = "random-crop"
    PAD = "pad"


class OnSmall(enum.Enum):
    """What to do with an image smaller than the crop: stop, or enlarge it (as ADM does)."""

    ERROR = "error"
    UPSCALE = "upscale"


class OnCorrupt(enum.Enum):
    """What to do with an image that cannot be read: stop, or take the next one and count."""

    ERROR = "error"
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from (see :func:`pra.data.open_source`) and how they are prepared."""

    source: str
    fit: Fit = Fit.CENTER_CROP
    flip: bool = False
    on_small: OnSmall = OnSmall.ERROR
    on_corrupt: OnCorrupt = OnCorrupt.ERROR
    workers: int = 0

    def __post_init__(self) -> None:
        _between(self, "workers", 0, 1024)


# --- training -----------------------------------------------------------------------------------------------


class PixelLoss(enum.Enum):
    """The reconstruction loss on pixels."""

    L1 = "l1"
    L2 = "l2"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Loss weights and the randomness of a training step (design section 2).

    ``noise_draws`` is the number of ``(t, eps)`` pairs per token for L_flow; ``logit_normal_times`` draws those
    times as the sigmoid of a normal of ``time_mean`` and ``time_std`` (Stable Diffusion 3, arXiv 2403.03206), else
    uniformly. JiT has one ``(t, eps)`` per image, and of the weights none. A head with shortcuts takes
    ``shortcut_draws`` steps per token more, for L_shortcut.
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
        _positive(self, "noise_draws", "shortcut_draws", "time_std")
        _between(self, "time_mean", -10.0, 10.0)
        _between(self, "perceptual_weight", 0.0, math.inf)
        _between(self, "auxiliary_weight", 0.0, math.inf)
        _between(self, "class_dropout", 0.0, 1.0)


class LearningRate(enum.Enum):
    """The learning rate after warm-up: constant, or a cosine to zero at the last step."""

    CONSTANT = "constant"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay acts on matrices only. ``clip`` bounds the gradient's norm."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    warmup_steps: int = 100
    schedule: LearningRate = LearningRate.CONSTANT
    clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        _positive(self, "lr", "clip")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise PraError(f"betas must lie in [0, 1), got {self.betas}")
        _between(self, "weight_decay", 0.0, math.inf)
        _between(self, "warmup_steps", 0, math.inf)
        _between(self, "ema_decay", 0.0, 1.0)


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

    For the first ``codec_warmup`` steps L_rec is the only loss (for the ablation: everything is trained together in
    the paper). ``compile`` has torch fuse the step's arithmetic: a minute at the start for a faster step (on CPUs it
    needs a C++ compiler); the whole loss in one process, block by block in several. Intervals are in steps.
    ``sample_every=0`` draws no grids. With ``shortcut_only`` all weights stay but those of the second head.
    """

    steps: int
    batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    rollout: Rollout = Parallel()
    codec_warmup: int = 0
    shortcut_only: bool = False
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = Precision.AUTO
    compile: bool = False
    parallel: Parallelism = Parallelism.DDP
    activation_checkpointing: bool = False
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch_size", "log_every", "checkpoint_every")
        _between(self, "sample_every", 0, math.inf)
        _between(self, "codec_warmup", 0, math.inf)
        _between(self, "seed", 0, 2**63 - 1)
        _between(self, "keep_checkpoints", 1, math.inf)
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise PraError(f"batch_size {self.batch_size} is not divisible by micro_batch_size {micro}")

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
                f"does is {max(1, round(self.batch_size / unit)) * unit}, or take another number of processes"
            )
        local = self.batch_size // processes
        return (micro, local // micro) if split and micro is not None else (local, 1)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Published figures that a recipe is to be held against."""

    source: str
    parameters: float | None = None
    fid_50k: float | None = None
    linear_probe: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete run: what a recipe returns and what ``config.json`` in a run's folder holds.

    ``initial`` is what the weights are at first: a run's folder, a saved model or ``hub:user/model``, of the same model
    but for its classes, and perhaps without the second head (:mod:`pra.train.initial`); None is new ones.
    """

    recipe: str
    model: AnyModelConfig
    data: DataConfig
    train: TrainConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    targets: Targets | None = None
    initial: str | None = None

    def __post_init__(self) -> None:
        check_sampling(self.model, self.sampling)
        if isinstance(self.model, JiTConfig) and self.train.rollout != Clean():
            raise PraError(
                f"train.rollout {type(self.train.rollout).__name__} is for autoregressive models: JiT has no prefix to "
                "roll out; set train.rollout=Clean"
            )
        if self.model.codec is None and self.train.codec_warmup:
            raise PraError(f"train.codec_warmup {self.train.codec_warmup}: this model has no codec to warm up; set 0")
        two_heads = isinstance(self.model, ModelConfig) and self.model.head.shortcut
        if self.train.shortcut_only and not (two_heads and self.initial):
            raise PraError(
                "train.shortcut_only is for the second head (model.head.shortcut) of a model that is trained: "
                "pra distill RUN sets all three"
            )


def check_sampling(model: AnyModelConfig, sampling: SamplingConfig) -> None:
    """Whether a model can be sampled this way.

    Raises:
        PraError: it cannot.
    """
    if isinstance(model, JiTConfig) and sampling.schedule is GuidanceSchedule.LINEAR:
        raise PraError(
            "the guidance schedule linear rises along the raster, and JiT makes all patches at once; "
            "take the schedule constant"
        )
    if sampling.solver is not Solver.SHORTCUT:
        return
    if not isinstance(model, ModelConfig) or not model.head.shortcut:
        raise PraError(
            "the solver shortcut needs a head that has learnt shortcuts, and this model's has not; take another "
            "solver, or train a PRA with model.head.shortcut=true"
        )
    unequal = sampling.time_grid is not TimeGrid.UNIFORM or sampling.shift != 1.0 or sampling.times is not None
    if sampling.steps not in SHORTCUT_STEPS or unequal:
        raise PraError(
            f"the solver shortcut takes {', '.join(map(str, SHORTCUT_STEPS))} equal steps, which is what the head has "
            f"learnt; not steps {sampling.steps}, time_grid {sampling.time_grid.value}, shift {sampling.shift:g}, "
            f"times {sampling.times}"
        )


# --- JSON ---------------------------------------------------------------------------------------------------

T = TypeVar("T")

TAGGED = (*typing.get_args(Rollout), JiTConfig)
"""Classes that JSON names as "type". Of several possible ones a single one may do without: it is what no type means."""


def to_dict(config: Any) -> Any:
    """Plain JSON values. A dataclass that is one of several possible (a rollout, JiT) carries its class as "type"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        tag = {"type": type(config).__name__} if isinstance(config, TAGGED) else {}
        return tag | fields
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], values: Any, where: str = "config") -> T:
    """Inverse of :func:`to_dict`; absent keys take their defaults.

    Raises:
        PraError: an unknown key (the nearest name is given), a missing one, or a value of the wrong type.
    """
    return typing.cast(T, _read(cls, values, where))


def model_from_dict(values: Any, where: str) -> AnyModelConfig:
    """:func:`from_dict` for a model of either kind.

    Raises:
        PraError: as :func:`from_dict`.
    """
    return typing.cast(AnyModelConfig, _read(AnyModelConfig, values, where))


def override(config: T, path: str, text: str) -> T:
    """``override(run, "train.optimizer.lr", "1e-3")``: a copy with one field replaced.

    ``text`` is read as JSON, and as a plain string where it is none.

    Raises:
        PraError: no such field (the nearest name is given), or a value of the wrong type or range.
    """
    values = to_dict(config)
    here, *parents = values, *path.split(".")[:-1]
    for name in parents:
        if not isinstance(here, dict) or name not in here:
            raise PraError(f"no setting {path!r}: {name!r} is unknown{nearest(name, _keys(here))}")
        here = here[name]
    last = path.split(".")[-1]
    if not isinstance(here, dict) or last not in here:
        raise PraError(f"no setting {path!r}: {last!r} is unknown{nearest(last, _keys(here))}")
    try:
        here[last] = json.loads(text)
    except json.JSONDecodeError:
        here[last] = text
    return from_dict(type(config), values, "setting")


def apply_settings(config: T, settings: Iterable[str]) -> T:
    """``apply_settings(run, ["train.optimizer.lr=1e-3"])``: :func:`override` by lines, as ``--set`` takes them.

    Raises:
        PraError: as :func:`override`, or a line without ``=``.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise PraError(f"--set {setting!r} needs the form KEY=VALUE, such as sampling.guidance=2")
        config = override(config, path, value)
    return config


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``["train.batch_size: 64 in the run, 128 asked for"]``: where two ``to_dict`` values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        prefix = f"{path}." if path else ""
        return [line for k in keys for line in differences(old.get(k), new.get(k), prefix + k)]
    return [] if old == new else [f"{path}: {json.dumps(old)} in the run, {json.dumps(new)} asked for"]


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(typing.get_args(kind), value, where)
    if origin is tuple:
        items = typing.get_args(kind)
        if items[-1] is Ellipsis and isinstance(value, list | tuple):
            items = items[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise PraError(f"{where}: expected {len(items)} values, got {value!r}")
        return tuple(_read(item, v, where) for item, v in zip(items, value, strict=True))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        names = {str(member.value): member for member in kind}
        if value not in names:
            raise PraError(f"{where}: {value!r} is unknown{nearest(str(value), names)}")
        return names[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PraError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    named = {kind.__name__: kind for kind in kinds if kind is not type(None)}
    if len(named) == 1:
        return _read(next(iter(named.values())), value, where)
    if isinstance(value, str):  # a bare name: the defaults of that class
        value = {"type": value}
    untagged = [kind for kind in named.values() if kind not in TAGGED]
    if len(untagged) == 1 and not (isinstance(value, dict) and "type" in value):
        return _read(untagged[0], value, where)
    if not isinstance(value, dict) or value.get("type") not in named:
        got = value.get("type") if isinstance(value, dict) else value
        raise PraError(f"{where}: {got!r} is unknown{nearest(str(got), named)}")
    fields = {k: v for k, v in value.items() if k != "type"}
    return _read(named[value["type"]], fields, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise PraError(f"{where}: expected the fields of {kind.__name__}, got {value!r}")
    every = typing.get_type_hints(kind)
    hints = {f.name: every[f.name] for f in dataclasses.fields(kind)}
    for key in value:
        if key not in hints:
            raise PraError(f"{where}.{key} is unknown{nearest(key, hints)}")
    fields = {key: _read(hints[key], v, f"{where}.{key}") for key, v in value.items()}
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in fields]
    if missing:
        raise PraError(f"{where}: {', '.join(missing)} missing")
    try:
        return kind(**fields)
    except PraError as error:
        raise PraError(f"{where}: {error}") from None


def _keys(values: Any) -> list[str]:
    return list(values) if isinstance(values, dict) else []
