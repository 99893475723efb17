"""Settings of the models: PRA, its relatives on pixels, and JiT."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pra.config.checks import NaturalInt, PositiveFloat, Settings, nearest_multiple, within, wrong

Size = Annotated[int, within(1, 1_000_000)]
"""Widths, sides and counts of a model: a stranger's file may ask for any number."""
MOST_PATCHES = 65_536
Depth = Annotated[int, within(1, 1_000)]
"""Blocks of a part. The bound stops a stranger's file from building modules without end."""


class Prediction(enum.Enum):
    """The prediction of the head's last layer; either way it is trained as, and integrated as, a velocity."""

    VELOCITY = "velocity"
    DATA = "data"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Settings):
    """A pre-norm transformer. ``width`` is a multiple of ``heads``; ``width / heads`` is a multiple of 4 (2-D RoPE)."""

    depth: Depth
    width: Size
    heads: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % (4 * self.heads):
            nearest = nearest_multiple(self.width, 4 * self.heads)
            problem = f"with {self.heads} heads is not a multiple of 4 a head (2-D rotary embedding)"
            raise wrong("width", self.width, f"{problem}. Use a width of {nearest}")


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Settings):
    """The flow-matching head: ``depth`` residual MLP blocks that share ``modulations`` AdaLN projections.

    With ``shortcut`` a second head of the same sizes learns steps of its flow (shortcut models, arXiv 2410.12557). It
    takes the length of a step and returns the mean velocity over it, for sampling in few evaluations
    (``Solver.SHORTCUT``).
    With ``shortcut_guidance`` it also takes the guidance scale, from 1 to this number, and learns guided steps (arXiv
    2210.03142): a guided image then needs one stream of the backbone.
    """

    depth: Depth
    width: Size
    modulations: Size = 2
    prediction: Prediction = Prediction.VELOCITY
    shortcut: bool = False
    shortcut_guidance: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth % self.modulations:
            nearest = nearest_multiple(self.depth, self.modulations)
            problem = f"is not divisible by modulations {self.modulations}: each projection serves as many blocks"
            raise wrong("head depth", self.depth, f"{problem}. Use a depth of {nearest}")
        if self.shortcut and self.prediction is not Prediction.VELOCITY:
            problem = "excludes shortcut, which predicts mean velocities. Use velocity, or shortcut=false"
            raise wrong("prediction", self.prediction.value, problem)
        if self.shortcut_guidance is not None and not (self.shortcut and self.shortcut_guidance > 1):
            problem = "is the largest scale that a second head is told. Use a number above 1, with shortcut true"
            raise wrong("shortcut_guidance", f"{self.shortcut_guidance:g}", problem)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings):
    """The state encoder ``G``: a residual MLP on each patch, with or without the condition ``h_i``."""

    depth: Depth
    width: Size
    sees_condition: bool = True


@dataclass(frozen=True, kw_only=True)
class DeblockConfig(Settings):
    """The deblocking filter: a residual MLP that corrects each patch of a finished picture.

    It reads the patch and ``margin`` pixels around it. The causal decoder writes a patch before the patches to the
    right and below, so that seams show along its borders; the filter sees both sides. It works outside the loop,
    unlike H.264's: patches are fed back unfiltered.
    """

    margin: Size = 4
    width: Size = 64
    depth: Depth = 1


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Settings):
    """Learned states: the encoder ``G``, states of ``state_dim`` numbers, and the pixel decoder ``D``.

    Without ``context`` the decoder writes each patch from its own state alone (for the ablation: PRA's reads all
    states so far). ``deblock`` is a filter of finished pictures, which the paper does not have.
    """

    state_dim: int
    encoder: EncoderConfig
    decoder: TransformerConfig
    context: bool = True
    deblock: DeblockConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.state_dim < 3:
            problem = "is below 3: LayerNorm takes two degrees of freedom from a state. Use 3 or more"
            raise wrong("state_dim", self.state_dim, problem, "invalid")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(Settings):
    """A frozen text encoder of the library transformers: a folder or a model on the Hub; ``width`` of its features."""

    name: str
    width: Size


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings):
    """Captions as conditions: ``tokens`` learned queries read a text of at most ``max_length`` bytes (UTF-8).

    ``transformer`` is the reader; it attends in both directions. With ``ngrams`` a byte is also embedded by the bytes
    before it, hashed to that many embeddings. With ``frozen`` the reader reads the features of that encoder in place of
    bytes, and ``max_length`` counts the encoder's tokens.
    """

    max_length: Annotated[int, within(1, 4096)] = 96
    tokens: Size = 8
    ngrams: Annotated[int, within(0, 2**24)] = 0
    transformer: TransformerConfig
    frozen: FrozenConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ngrams and self.frozen:
            raise wrong(
                "ngrams", self.ngrams, "hashes bytes, and a frozen encoder reads its own tokens. Use 0", "conflict"
            )

    @property
    def unit(self) -> str:
        """The unit that ``max_length`` counts."""
        return "tokens" if self.frozen else "bytes in UTF-8"


@dataclass(frozen=True, kw_only=True)
class ImageConfig(Settings):
    """The images, their patches and their classes, and the members that every kind of model has.

    ``num_classes`` counts the real classes; the null class that guidance needs comes on top. With ``text`` a caption
    stands beside the class. Each kind also has ``class_tokens``, the tokens of a class before the patches; a
    ``codec`` (``None`` if it writes pixels directly), the ``width`` of the transformer that reads the patches, and
    ``in_words()``, a name and a sentence for each part.

    Attributes:
        name: of this kind of model; ``title`` is what a model card calls it, and ``tags`` are its tags on the Hub.
        autoregressive: whether patches are generated in raster order, each from the patches before it.
        reading_time: the flow time at which images are read for features by default; ``None`` if clean images are read.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]
    autoregressive: ClassVar[bool]
    reading_time: ClassVar[float | None] = None

    image_size: tuple[Size, Size]
    channels: Size
    patch_size: Size
    num_classes: Size
    text: TextConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        (height, width), patch = self.image_size, self.patch_size
        if height % patch or width % patch:
            rows, columns = (nearest_multiple(side, patch) // patch for side in self.image_size)
            columns = max(columns, 2) if rows == 1 else columns  # a model needs two patches
            fix = f"Use the nearest size, {rows * patch}x{columns * patch}"
            raise wrong("image_size", f"{height}x{width}", f"is not divisible by patch_size {patch}. {fix}")
        if self.num_patches < 2:
            problem = f"is a single patch of {patch}. Use a smaller patch_size"
            raise wrong("image_size", f"{height}x{width}", problem)
        if self.num_patches > MOST_PATCHES:
            problem = f"has {self.num_patches:,} patches, of {MOST_PATCHES:,} at most. Use a larger patch_size"
            raise wrong("image_size", f"{height}x{width}", problem)

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
    def group(self) -> tuple[int, int]:
        """Rows and columns of the patches that are generated together, at one position."""
        return 1, 1

    @property
    def group_size(self) -> int:
        """``k``, patches in a group."""
        return self.group[0] * self.group[1]

    @property
    def group_grid(self) -> tuple[int, int]:
        """Groups per column and per row."""
        return self.grid[0] // self.group[0], self.grid[1] // self.group[1]

    @property
    def num_groups(self) -> int:
        """``N / k``, positions along the raster of groups."""
        return self.num_patches // self.group_size

    @property
    def group_dim(self) -> int:
        """``k * P``, numbers in the pixels of one group."""
        return self.group_size * self.patch_dim

    @property
    def group_state_dim(self) -> int:
        """``k * d``, numbers that are generated at one position."""
        return self.group_size * self.state_dim

    @property
    def group_height(self) -> int:
        """Pixels in a row of groups, from top to bottom."""
        return self.group[0] * self.patch_size

    @property
    def has_shortcut(self) -> bool:
        """Whether a second head takes steps of the flow (:class:`HeadConfig`)."""
        return False

    @property
    def shortcut_guidance(self) -> float | None:
        """The largest guidance scale that the second head is told; ``None`` where it is not told."""
        return None

    @property
    def text_tokens(self) -> int:
        """Tokens of a caption before the patches."""
        return self.text.tokens if self.text else 0

    @property
    def unit(self) -> str:
        """The unit that a solver generates at a time."""
        if not self.autoregressive:
            return "image"
        return "patch" if self.group_size == 1 else f"group of {self.group_size} patches"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ImageConfig):
    """The whole autoregressive model. ``codec=None`` is the identity codec: the patch itself is the state.

    ``group`` are the rows and columns of the patches that are generated together (after BitDance, arXiv 2602.14041):
    the backbone and the decoder have one token per group, and the head generates the group's states jointly. Patches
    keep their own states; the encoder and the deblocking filter see single patches.
    """

    name = "PRA"
    title = "Autoregressive model, straight in pixel space:"
    tags = ("autoregressive", "pra")
    autoregressive: ClassVar[Literal[True]] = True

    backbone: TransformerConfig
    head: HeadConfig
    codec: CodecConfig | None
    class_tokens: Size = 16
    group: tuple[Size, Size] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        (rows, columns), (across, down) = self.group, (self.grid[1], self.grid[0])
        group, grid = f"{rows}x{columns}", f"{down}x{across}"
        if down % rows or across % columns:
            fix = f"Use rows that divide {down} and columns that divide {across}"
            raise wrong("group", group, f"does not divide the {grid} patches of an image. {fix}")
        if self.num_groups < 2:
            raise wrong("group", group, "is the whole image: nothing is autoregressive. Use a smaller group")

    @property
    def state_dim(self) -> int:
        """``d``, numbers in the state of a patch."""
        return self.codec.state_dim if self.codec else self.patch_dim

    @property
    def width(self) -> int:
        """The backbone's width."""
        return self.backbone.width

    @property
    def has_shortcut(self) -> bool:
        """Whether the head has a second head beside it (:class:`HeadConfig`)."""
        return self.head.shortcut

    @property
    def shortcut_guidance(self) -> float | None:
        """See :class:`ImageConfig`."""
        return self.head.shortcut_guidance

    def in_words(self) -> dict[str, str]:
        """Describe the parts."""
        body, head, states = self.backbone, self.head, "none: the patch itself is generated"
        if self.codec is not None:
            states = (
                f"{self.codec.state_dim} learned numbers per patch; the decoder has {self.codec.decoder.depth} blocks "
                f"of width {self.codec.decoder.width}"
            )
        if self.group_size > 1:
            states += f"; {self.group_size} patches ({self.group[0]} x {self.group[1]}) are generated at once"
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
    reading_time = 1.0
    """The best of the study's three on Fashion-MNIST."""

    transformer: TransformerConfig
    class_tokens: NaturalInt = 4
    bottleneck: Size | None = None

    @property
    def width(self) -> int:
        """The transformer's width."""
        return self.transformer.width

    def in_words(self) -> dict[str, str]:
        """Describe the parts."""
        body = self.transformer
        return {"Model": f"JiT: {body.depth} blocks of width {body.width}, all patches at once"}


AnyModelConfig = ModelConfig | JiTConfig
