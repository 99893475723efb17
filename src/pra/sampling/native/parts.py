"""The parts of a model in the compiled arithmetic: packed weights, a product, a transformer, the head.

The structures are those of ``step.cpp``. They hold addresses of parameters and of copies; both stay in place.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import Prediction
from pra.models.cache import KVCache
from pra.models.head import FlowHead, HeadBlock, Modulations, time_features, velocity_from_data
from pra.models.transformer import Block, Transformer
from pra.sampling.native.build import library

LANES = 16
"""Outputs in a panel of a matrix."""

DEEP = 32
"""Divisor of a matrix's number of inputs in bfloat16."""

POINTER, COUNT, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class LinearStruct(ctypes.Structure):
    """``Linear`` of ``products.h``."""

    _fields_: ClassVar = [
        *(("panels", POINTER), ("bias", POINTER), ("inputs", COUNT), ("outputs", COUNT), ("bfloat16", COUNT))
    ]


class Packed:
    """Copies of weights, bfloat16 with ``low``, renewed in place: the compiled arithmetic holds their addresses."""

    def __init__(self, low: bool) -> None:
        self.low = low
        self._copies: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def refresh(self) -> None:
        """Copy the model's present weights."""
        for kept, source in self._copies:
            kept.copy_(source())

    def kept(self, source: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a copy of the tensor that ``source`` returns; every :meth:`refresh` renews it."""
        kept = source().to(dtype, copy=True)
        self._copies.append((kept, source))
        return kept

    def linear(self, weight: Callable[[], Tensor], bias: Callable[[], Tensor] | None) -> LinearStruct:
        """Pack ``x @ weight.T + bias``, of a weight ``(outputs, inputs)`` and a bias ``(outputs,)``."""
        outputs, inputs = weight().shape
        if self.low:
            held = self.kept(lambda: pairs(weight().t()), torch.bfloat16)
        else:
            held = self.kept(lambda: panels(weight().t()))
        filled = None if bias is None else self.kept(lambda: F.pad(bias(), (0, -outputs % LANES))).data_ptr()
        return LinearStruct(held.data_ptr(), filled, inputs, outputs, self.low)

    def layer(self, module: nn.Linear) -> LinearStruct:
        """Pack a linear layer."""
        assert type(module) is nn.Linear, "asked without looking whether it is supported"
        return self.linear(
            lambda: module.weight.detach(), None if module.bias is None else lambda: module.bias.detach()
        )


def panels(matrix: Tensor) -> Tensor:
    """Rearrange ``(inputs, outputs)`` to ``(ceil(outputs / LANES), inputs, LANES)``, padded with zeros."""
    filled = F.pad(matrix, (0, -matrix.shape[1] % LANES)).contiguous()
    return filled.view(len(matrix), -1, LANES).transpose(0, 1).contiguous()


def pairs(matrix: Tensor) -> Tensor:
    """Rearrange ``(inputs, outputs)`` to ``(ceil(outputs / LANES), inputs' / 2, LANES, 2)``.

    Two inputs of an output lie together. Zeros pad the outputs, and pad the inputs to a multiple of ``DEEP``.
    """
    filled = panels(F.pad(matrix, (0, 0, 0, -len(matrix) % DEEP)))
    return filled.view(len(filled), -1, 2, LANES).transpose(2, 3).contiguous()


def content_hash(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Hash the numbers in each tensor; ``None`` unless all are contiguous float32 on the CPU."""
    # Hash the content: torch's own count of changes misses fused optimizers and ``.data``.
    hashed = list(tensors)
    if any(t.device.type != "cpu" or t.dtype is not torch.float32 or not t.is_contiguous() for t in hashed):
        return None
    found = library()
    if found is None:
        return None
    found.pra_hash.argtypes, found.pra_hash.restype = [POINTER, COUNT], ctypes.c_uint64
    return tuple(int(found.pra_hash(tensor.data_ptr(), tensor.numel())) for tensor in hashed)


def checked(function: Any, arguments: list[Any]) -> Callable[..., None]:
    """Return a function of the library, with the types of its arguments. It raises if memory is short."""
    function.argtypes, function.restype = arguments, ctypes.c_int32

    def call(*values: Any) -> None:
        if function(*values):
            raise MemoryError("no memory for a step of the sampler. Sample fewer images at a time")

    return call


class _Block(ctypes.Structure):
    _fields_: ClassVar = [
        *(("attention_norm", POINTER), ("qkv", LinearStruct), ("out", LinearStruct)),
        *(("mlp_norm", POINTER), ("into", LinearStruct), ("mlp_out", LinearStruct)),
    ]


class _HeadBlock(ctypes.Structure):
    _fields_: ClassVar = [
        *(("norm", POINTER), ("norm_bias", POINTER)),
        *(("into", LinearStruct), ("out", LinearStruct), ("modulation", COUNT)),
    ]


class NativeLinear:
    """The product ``x @ weight.T + bias`` of a packed layer, whose copies :class:`Packed` keeps."""

    def __init__(self, found: ctypes.CDLL, linear: LinearStruct) -> None:
        self._linear = linear
        self._call = checked(found.pra_product, [POINTER, POINTER, POINTER, COUNT, THREADS])

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``(..., inputs)`` to ``(..., outputs)``."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._linear.outputs)
        rows = x.numel() // self._linear.inputs
        self._call(ctypes.byref(self._linear), x.data_ptr(), y.data_ptr(), rows, torch.get_num_threads())
        return y


class NativeTransformer:
    """The compiled :class:`pra.models.transformer.Transformer`, in float32, on the CPU."""

    def __init__(self, found: ctypes.CDLL, packed: Packed, transformer: Transformer) -> None:
        blocks = [block for block in transformer.blocks if isinstance(block, Block)]
        self._norm, self._heads = transformer.norm.weight.detach(), transformer.config.heads
        self._group = transformer.group
        self._rotary = packed.kept(lambda: _weighted_rotary(transformer.rotary, blocks))
        self._blocks = (_Block * len(blocks))()
        for place, block in enumerate(blocks):
            attention, mlp = block.attention, block.mlp
            first = block.attention_norm.weight.data_ptr(), packed.layer(attention.qkv), packed.layer(attention.out)
            second = block.mlp_norm.weight.data_ptr(), packed.layer(mlp.into), packed.layer(mlp.out)
            self._blocks[place] = _Block(*first, *second)
        weights, tokens = [POINTER, COUNT, POINTER, COUNT, COUNT], [POINTER, COUNT, COUNT, COUNT, POINTER, POINTER]
        cache = [POINTER, POINTER, COUNT, COUNT]
        self._call = checked(found.pra_transformer, [*weights, *tokens, *cache, THREADS])

    def __call__(self, x: Tensor, cache: KVCache | None) -> Tensor:
        """Map ``(B, T, width)`` to the same shape, after the tokens in the cache; without a cache ``T`` is 1."""
        x = x.clone(memory_format=torch.contiguous_format)
        batch, count, width = x.shape
        before = 0 if cache is None else cache.length
        own, other = self._rotary[:, before]
        weights = self._blocks, len(self._blocks), self._norm.data_ptr(), self._heads, width
        tokens = x.data_ptr(), batch, count, self._group, own.data_ptr(), other.data_ptr()
        kept: tuple[Any, ...] = (None, None, 0)
        if cache is not None:
            kept = cache.keys.data_ptr(), cache.values.data_ptr(), cache.capacity
        self._call(*weights, *tokens, *kept, before, torch.get_num_threads())
        return x


class NativeHead:
    """The methods of :class:`pra.models.head.FlowHead` that sampling calls, in float32, on the CPU."""

    def __init__(self, found: ctypes.CDLL, packed: Packed, head: FlowHead) -> None:
        self._head = head
        blocks = [block for block in head.blocks if isinstance(block, HeadBlock)]
        sharing = len(blocks) // len(head.modulations)
        self._blocks = (_HeadBlock * len(blocks))()
        for place, block in enumerate(blocks):
            layers = packed.layer(block.mlp.into), packed.layer(block.mlp.out)
            norm = block.norm.weight.data_ptr(), block.norm.bias.data_ptr()
            self._blocks[place] = _HeadBlock(*norm, *layers, place // sharing)
        self._state_in, self._out = packed.layer(head.state_in), packed.layer(head.out)
        projections = [m for m in (*head.modulations, head.final_modulation) if isinstance(m, nn.Linear)]
        all_modulations = packed.linear(
            lambda: torch.cat([projection.weight.detach() for projection in projections]),
            lambda: torch.cat([_one_added(projection) for projection in projections]),
        )
        self.project = NativeLinear(found, packed.layer(head.condition_in))
        self._modulate = NativeLinear(found, all_modulations)
        weights, states = [POINTER, COUNT, POINTER, POINTER], [POINTER, COUNT, COUNT]
        self._call = checked(found.pra_head, [*weights, *states, POINTER, COUNT, POINTER, THREADS])
        self._context = checked(found.pra_context, [POINTER, COUNT, POINTER, COUNT, COUNT, POINTER])

    def embed(self, t: Tensor, span: Tensor | None = None) -> Tensor:
        """Embed times as the head does, in float64 and rounded once: float32 may depend on the number of threads."""

        embedded = _in_float64(self._head.time_in, t)
        if self._head.span_in is not None:
            assert span is not None, "a head of steps was not told how long one is"
            embedded = embedded + _in_float64(self._head.span_in, span)
        return embedded.float()

    def embed_scale(self, scale: Tensor) -> Tensor:
        """Embed guidance scales, as :meth:`embed` does times."""
        assert self._head.scale_in is not None, "this head is not told the guidance scale"
        return _in_float64(self._head.scale_in, 1 - 1 / scale).float()

    def modulate(self, embedded: Tensor, condition: Tensor) -> Modulations:
        """Return one tensor ``(K, *rows, ...)`` of all projections' outputs, with ``1 + scale`` in place of each scale.

        ``embedded`` is ``(K, 1, ..., width)``, and ``condition`` is ``(*rows, width)``.
        """
        # Compile silu of the sum too: the last digit of torch's silu depends on the address.
        embedded, condition = embedded.contiguous(), condition.contiguous()
        count, width = len(embedded), condition.shape[-1]
        context = embedded.new_empty(count, *condition.shape)
        rows = condition.numel() // width
        self._context(embedded.data_ptr(), count, condition.data_ptr(), rows, width, context.data_ptr())
        return [self._modulate(context)]

    def __call__(
        self, z: Tensor, t: Tensor, condition: Tensor, span: Tensor | None, modulations: Modulations | None
    ) -> Tensor:
        """Return the head's velocity at ``z`` ``(B, 1, d)``; ``modulations`` are from :meth:`modulate`."""
        assert modulations is not None, "the compiled head is told its modulations"
        (modulated,), z = modulations, z.contiguous()
        width = modulated.shape[-1]
        prediction = z.new_empty(*modulated.shape[:-1], z.shape[-1])
        weights = self._blocks, len(self._blocks), ctypes.byref(self._state_in), ctypes.byref(self._out)
        states = z.data_ptr(), len(z), modulated.numel() // width
        self._call(*weights, *states, modulated.data_ptr(), width, prediction.data_ptr(), torch.get_num_threads())
        if self._head.prediction is Prediction.DATA:
            return velocity_from_data(prediction, z, t)
        return prediction


def _in_float64(module: nn.Module, at: Tensor) -> Tensor:
    embedded: Tensor = copy.deepcopy(module).double()(time_features(at).double())
    return embedded


def _weighted_rotary(table: Tensor, blocks: list[Block]) -> Tensor:
    # rotate(w * x) is x * own + swapped(x) * other: w is the norm's weight, swapped exchanges the halves.
    norms = [torch.stack([b.attention.query_norm.weight, b.attention.key_norm.weight]) for b in blocks]
    first, second = torch.stack(norms).detach().view(len(blocks), 2, -1).chunk(2, dim=-1)
    cos, sin = table[:, :, None, None]
    own = torch.cat([first * cos, second * cos], dim=-1)
    other = torch.cat([-second * sin, first * sin], dim=-1)
    return torch.stack([own, other])


def _one_added(projection: nn.Linear) -> Tensor:
    """Return the bias of a projection to shift, scale and perhaps a gate, changed to give ``1 + scale``."""
    bias, width = projection.bias.detach().clone(), projection.in_features
    bias[width : 2 * width] += 1.0
    return bias
