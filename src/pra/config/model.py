"""Settings of the models: PRA, its relatives on pixels, and JiT."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pra.config.checks import between, coerce, divisors, nearest_multiple, nearest_of, positive
from pra.errors import PraError


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
        coerce(self)
        positive(self, "depth", "width", "heads")
        if self.width % (4 * self.heads):
            heads = nearest_of((one for one in divisors(self.width) if self.width // one % 4 == 0), self.heads)
            raise PraError(
                f"width {self.width} with {self.heads} heads: width / heads must be a whole multiple of 4 "
                f"(2-D rotary embedding); try {f'heads={heads} or ' if heads else ''}"
                f"a width of {nearest_multiple(self.width, 4 * self.heads)}"
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
        coerce(self)
        positive(self, "depth", "width", "modulations")
        if self.depth % self.modulations:
            raise PraError(
                f"head depth {self.depth} is not divisible by modulations {self.modulations}: each AdaLN projection "
                "serves the same number of consecutive blocks; take "
                f"modulations={nearest_of(divisors(self.depth), self.modulations)} or a depth of "
                f"{nearest_multiple(self.depth, self.modulations)}"
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
        coerce(self)
        positive(self, "depth", "width")


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
        coerce(self)
        if self.state_dim < 3:
            raise PraError(
                f"state_dim {self.state_dim} is below 3: LayerNorm takes two degrees of freedom from a state, "
                "so that fewer than 3 numbers cannot vary continuously"
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The images, their patches and their classes; and what every kind of model states of itself.

    ``num_classes`` counts the real classes; the null class that guidance needs comes on top. Each kind also has a
    ``codec`` (``None`` if it writes pixels directly), the ``width`` of the transformer that reads the patches, and
    ``in_words()``: its parts for a person, a name and a sentence each.
    """

    name: ClassVar[str]
    """The name of this kind of model."""
    title: ClassVar[str]
    """What a model card calls it, before the size of its images."""
    tags: ClassVar[tuple[str, ...]]
    """Its tags on the Hub."""
    autoregressive: ClassVar[bool]
    """Whether patches are generated in raster order, each from those before it; otherwise all at once."""
    reading_time: ClassVar[float | None] = None
    """The flow time at which images are read for features where none is named; ``None`` if clean ones are read."""

    image_size: tuple[int, int]
    channels: int
    patch_size: int
    num_classes: int

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "channels", "patch_size", "num_classes")
        size = _by(self.image_size)
        if min(self.image_size) < 1:
            raise PraError(f"image_size must be two positive numbers, got {size}")
        if any(side % self.patch_size for side in self.image_size):
            raise PraError(
                f"image_size {size} is not divisible by patch_size {self.patch_size}; the nearest size is "
                f"{self._nearest_size()}{self._or_another_patch()}"
            )
        if self.num_patches < 2:
            raise PraError(
                f"image_size {size} is a single patch of {self.patch_size}: a model of patches needs at least two; "
                "take a smaller patch_size"
            )

    def _nearest_size(self) -> str:
        """Of at least two patches."""
        height, width = (nearest_multiple(side, self.patch_size) for side in self.image_size)
        return _by((height, max(width, 2 * self.patch_size) if height == self.patch_size else width))

    def _or_another_patch(self) -> str:
        """The nearest size of patches, more than one, into which the images can be cut."""
        fitting = (one for one in divisors(math.gcd(*self.image_size)) if one < max(self.image_size))
        patch = nearest_of(fitting, self.patch_size)
        return f", the nearest patch_size {patch}" if patch else ""

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
    def has_shortcut(self) -> bool:
        """Whether a second head takes steps of the flow (:class:`HeadConfig`)."""
        return False

    @property
    def unit(self) -> str:
        """What a solver generates at a time."""
        return "patch" if self.autoregressive else "image"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ImageConfig):
    """The whole autoregressive model. ``codec=None`` is the identity codec: the patch itself is the state."""

    name = "PRA"
    title = "Autoregressive model, straight in pixel space:"
    tags = ("autoregressive", "pra")
    autoregressive: ClassVar[Literal[True]] = True

    backbone: TransformerConfig
    head: HeadConfig
    codec: CodecConfig | None
    class_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "class_tokens")

    @property
    def state_dim(self) -> int:
        """``d``, numbers that the head generates per patch."""
        return self.codec.state_dim if self.codec else self.patch_dim

    @property
    def width(self) -> int:
        """The backbone's."""
        return self.backbone.width

    @property
    def has_shortcut(self) -> bool:
        """As the head says."""
        return self.head.shortcut

    def in_words(self) -> dict[str, str]:
        """The parts, for a person."""
        body, head, states = self.backbone, self.head, "none: the patch itself is generated"
        if self.codec is not None:
            states = (
                f"{self.codec.state_dim} learned numbers per patch; the decoder has {self.codec.decoder.depth} blocks "
                f"of width {self.codec.decoder.width}"
            )
        return {
            "States": states,
            "Model": f"a causal backbone of {body.depth} blocks of width {body.width}; a head of {head.depth} blocks "
            f"of width {head.width} that predicts {head.prediction.value}",
        }


@dataclass(frozen=True, kw_only=True)
class JiTConfig(ImageConfig):
    """The diffusion baseline JiT (arXiv 2511.13720): one bidirectional transformer over all patches at once.

    ``class_tokens`` of the class stand before the patches, beside its modulation of every block; 0 is none.
    ``bottleneck`` embeds a patch through that many numbers (the paper's low-rank embedding); None is a plain matrix.
    """

    name = "JiT"
    title = "JiT (pixel diffusion)"
    tags = ("jit", "diffusion")
    autoregressive: ClassVar[Literal[False]] = False
    codec: ClassVar[None] = None
    """It writes pixels directly."""
    reading_time = 1.0
    """The best of the study's three on Fashion-MNIST."""

    transformer: TransformerConfig
    class_tokens: int = 4
    bottleneck: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, "class_tokens", 0, math.inf)
        if self.bottleneck is not None:
            positive(self, "bottleneck")

    @property
    def width(self) -> int:
        """The transformer's."""
        return self.transformer.width

    def in_words(self) -> dict[str, str]:
        """The parts, for a person."""
        body = self.transformer
        return {"Model": f"JiT: {body.depth} blocks of width {body.width}, all patches at once"}


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


AnyModelConfig = ModelConfig | JiTConfig
