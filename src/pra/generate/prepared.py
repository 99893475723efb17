"""The weights as a single token's step reads them (:mod:`pra.generate.step`): matrices transposed, in the dtype of the
products, and what depends on the weights and a position or a time alone, worked out beforehand.

In float32 the matrices are the model's own, seen transposed. What has to be a copy :meth:`Prepared.refresh` renews in
place: a captured step goes on reading the same memory when the weights have changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pra.models.backbone import Backbone
from pra.models.head import FlowHead, HeadBlock, time_features
from pra.models.states import PixelDecoder
from pra.nn.transformer import Block, KVCache, Transformer

NativeTokens = Callable[[Tensor, KVCache | None, int], Tensor]
"""Takes tokens ``(B, T, width)`` through a transformer, behind so many that its cache holds."""


class NativeHeadStep(Protocol):
    """What the head does at one position (:class:`pra.generate.native.NativeHead`)."""

    def context(self, times: Tensor, condition: Tensor) -> Tensor:
        """``silu(times + condition)`` of all times and rows."""

    def normalise(self, states: Tensor) -> Tensor:
        """States to zero mean and unit variance."""

    def __call__(self, z: Tensor, modulated: Tensor, streams: int) -> Tensor:
        """What the head predicts at one evaluation."""


class Linear(NamedTuple):
    """``x @ matrix + bias``; ``native``, where there is one, does it."""

    matrix: Tensor
    bias: Tensor | None
    native: Callable[[Tensor], Tensor] | None = None


class BlockWeights(NamedTuple):
    """Of a transformer's block."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    mlp_into: Linear
    mlp_out: Linear


class HeadBlockWeights(NamedTuple):
    """Of a block of the head; ``modulation`` is the number of the projection that it shares."""

    norm: Tensor
    norm_bias: Tensor
    into: Linear
    out: Linear
    modulation: int


class Prepared:
    """What every prepared part is made with.

    Args:
        dtype: of the matrix products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.matrices: list[Tensor] = []
        self.copies: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def refresh(self) -> None:
        """Takes over the model's present weights."""
        for kept, source in self.copies:
            kept.copy_(source())

    def linear(self, module: nn.Linear) -> Linear:
        """A module's weights."""
        bias = None if module.bias is None else self.seen(module.bias)
        self.matrices.append(self.seen(module.weight))
        return Linear(self.matrices[-1].t(), bias)

    def bytes(self) -> int:
        """Of all matrices that :meth:`linear` has given."""
        return sum(matrix.nbytes for matrix in self.matrices)

    def seen(self, parameter: Tensor) -> Tensor:
        """A parameter in the dtype of the products: itself, if it is."""
        if parameter.dtype is self.dtype:
            return parameter.detach()
        return self.kept(parameter.detach, self.dtype)

    def kept(self, source: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of what ``source`` gives, now and at every :meth:`refresh`."""
        kept = source().to(dtype, copy=True)
        self.copies.append((kept, source))
        return kept


class TransformerWeights(Prepared):
    """Of a transformer. ``rotary`` ``(2, T, depth, 2, 1, 1, head_dim)`` turns and weights queries and keys at once:

    ``rotate(w * x)`` of :func:`pra.nn.rope.rotate` is ``x * rotary[0] + swapped(x) * rotary[1]``, where ``w`` is the
    weight of the query's or the key's norm and ``swapped`` exchanges the halves.

    ``native``, where there is one, does the step: :class:`pra.generate.native.NativeTransformer`.
    """

    native: NativeTokens | None = None

    def __init__(self, transformer: Transformer, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        blocks = [block for block in transformer.blocks if isinstance(block, Block)]
        self.heads = transformer.config.heads
        self.blocks = [
            BlockWeights(
                block.attention_norm.weight.detach(),
                self.linear(block.attention.qkv),
                self.linear(block.attention.out),
                block.mlp_norm.weight.detach(),
                self.linear(block.mlp.into),
                self.linear(block.mlp.out),
            )
            for block in blocks
        ]
        self.norm = transformer.norm.weight.detach()
        self.rotary = self.kept(lambda: _weighted_rotary(transformer.rotary, blocks))


class BackboneWeights(TransformerWeights):
    """Of the backbone, without what only a prefix needs."""

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__(backbone.transformer, dtype)
        self.class_tokens = backbone.class_tokens
        self.patch_in = self.linear(backbone.patch_in)
        self.next_position = backbone.next_position.detach()


class DecoderWeights(TransformerWeights):
    """Of the pixel decoder."""

    def __init__(self, decoder: PixelDecoder, dtype: torch.dtype) -> None:
        super().__init__(decoder.transformer, dtype)
        self.context = decoder.context
        self.state_in, self.patch_out = self.linear(decoder.state_in), self.linear(decoder.out)


def _weighted_rotary(table: Tensor, blocks: Sequence[Block]) -> Tensor:
    norms = [torch.stack([b.attention.query_norm.weight, b.attention.key_norm.weight]) for b in blocks]
    first, second = torch.stack(norms).detach().view(len(blocks), 2, 1, 1, -1).chunk(2, dim=-1)
    cos, sin = table[:, :, None, None, None, None]
    own = torch.cat([first * cos, second * cos], dim=-1)
    other = torch.cat([-second * sin, first * sin], dim=-1)
    return torch.stack([own, other])


class HeadWeights(Prepared):
    """Of the head, for a known series of evaluations.

    ``times`` ``(K, width)`` are the embeddings of their times, and of the ``span`` of their steps if there is one.
    ``modulations`` gives, in one product, shift, ``1 + scale`` and gate of each projection in turn, then shift and
    ``1 + scale`` of the last layer. ``native``, where there is one, predicts: :class:`pra.generate.native.NativeHead`.
    """

    native: NativeHeadStep | None = None

    def __init__(self, head: FlowHead, times: Sequence[float], span: float | None, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.width = head.out.in_features
        self.prediction = head.prediction
        self.condition_in, self.state_in = self.linear(head.condition_in), self.linear(head.state_in)
        self.out = self.linear(head.out)
        asked = torch.tensor(times, dtype=torch.float32, device=head.out.weight.device)
        step = None if span is None else torch.full_like(asked, span)
        self.times = self.kept(lambda: _embedded(head, asked, step))
        sharing = len(head.blocks) // len(head.modulations)
        self.blocks = [
            HeadBlockWeights(
                block.norm.weight.detach(),
                block.norm.bias.detach(),
                self.linear(block.mlp.into),
                self.linear(block.mlp.out),
                index // sharing,
            )
            for index, block in enumerate(head.blocks)
            if isinstance(block, HeadBlock)
        ]
        projections = [m for m in (*head.modulations, head.final_modulation) if isinstance(m, nn.Linear)]
        matrix = self.kept(lambda: torch.cat([p.weight.detach() for p in projections]), dtype)
        bias = self.kept(lambda: torch.cat([_one_added(p) for p in projections]), dtype)
        self.modulations = Linear(matrix.t(), bias)


@torch.no_grad()
def _embedded(head: FlowHead, times: Tensor, span: Tensor | None) -> Tensor:
    """``head.time``; on CPUs in float64 and rounded once.

    In float32 torch's product may depend on the number of threads there (seen of four rows on an AMD EPYC), and with it
    every image.
    """
    if times.device.type != "cpu":
        return head.time(times, span)

    def through(module: nn.Module, at: Tensor) -> Tensor:
        embedded: Tensor = copy.deepcopy(module).double()(time_features(at).double())
        return embedded

    embedded = through(head.time_in, times)
    if head.span_in is not None:
        assert span is not None, "a head of steps was not told how long one is"
        embedded = embedded + through(head.span_in, span)
    return embedded.float()


def _one_added(projection: nn.Linear) -> Tensor:
    """The bias of a projection to shift, scale and perhaps a gate, such that it gives ``1 + scale``."""
    bias, width = projection.bias.detach().clone(), projection.in_features
    bias[width : 2 * width] += 1.0
    return bias
