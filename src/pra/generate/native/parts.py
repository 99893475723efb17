"""Products, a transformer's step and the head's prediction by the compiled arithmetic, in place of torch's operations.

The structures are those of ``step.cpp``. They hold addresses of tensors that stay where they are: parameters, which the
engine watches, and copies, which :meth:`pra.generate.prepared.Prepared.refresh` renews in place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.generate.native.build import library
from pra.generate.prepared import BackboneWeights, DecoderWeights, HeadWeights, Linear, Prepared, TransformerWeights
from pra.nn.transformer import KVCache

LANES = 16
"""Outputs side by side in a panel of a matrix."""

DEEP = 32
"""In bfloat16 a multiple of so many inputs."""

_POINTER, _COUNT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def _checked(function: Any, arguments: list[Any]) -> Callable[..., None]:
    function.argtypes, function.restype = arguments, ctypes.c_int32

    def call(*values: Any) -> None:
        if function(*values):
            raise MemoryError("no memory for a step of the sampler: fewer images side by side need less")

    return call


def content_hash(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """What changes when a number in any of them does; None of what does not lie in this machine's memory as float32.

    torch's own count of changes leaves out fused optimisers and ``.data``.
    """
    hashed = list(tensors)
    if any(t.device.type != "cpu" or t.dtype is not torch.float32 or not t.is_contiguous() for t in hashed):
        return None
    found = library()  # compiles it at the first call, which other devices have no use for
    if found is None:
        return None
    found.pra_hash.argtypes, found.pra_hash.restype = [_POINTER, _COUNT], ctypes.c_uint64
    return tuple(int(found.pra_hash(tensor.data_ptr(), tensor.numel())) for tensor in hashed)


class _Linear(ctypes.Structure):
    _fields_: ClassVar = [
        ("panels", _POINTER),
        ("bias", _POINTER),
        ("inputs", _COUNT),
        ("outputs", _COUNT),
        ("bfloat16", _COUNT),
    ]


class _Block(ctypes.Structure):
    _fields_: ClassVar = [
        ("attention_norm", _POINTER),
        ("qkv", _Linear),
        ("out", _Linear),
        ("mlp_norm", _POINTER),
        ("into", _Linear),
        ("mlp_out", _Linear),
    ]


class _HeadBlock(ctypes.Structure):
    _fields_: ClassVar = [
        ("norm", _POINTER),
        ("norm_bias", _POINTER),
        ("into", _Linear),
        ("out", _Linear),
        ("modulation", _COUNT),
    ]


def panels(matrix: Tensor) -> Tensor:
    """``(inputs, outputs)`` as ``(ceil(outputs / LANES), inputs, LANES)``, filled up with zeros."""
    filled = F.pad(matrix, (0, -matrix.shape[1] % LANES)).contiguous()
    return filled.view(len(matrix), -1, LANES).transpose(0, 1).contiguous()


def pairs(matrix: Tensor) -> Tensor:
    """``(inputs, outputs)`` as ``(ceil(outputs / LANES), inputs' / 2, LANES, 2)``, two inputs of an output together.

    Filled up with zeros, the inputs to a multiple of ``DEEP``.
    """
    filled = panels(F.pad(matrix, (0, 0, 0, -len(matrix) % DEEP)))
    return filled.view(len(filled), -1, 2, LANES).transpose(2, 3).contiguous()


def _linear(weights: Prepared, linear: Linear, low: bool) -> _Linear:
    matrix, bias, _ = linear
    inputs, outputs = matrix.shape
    held = weights.kept(lambda: pairs(matrix), torch.bfloat16) if low else weights.kept(lambda: panels(matrix))
    filled = None if bias is None else weights.kept(lambda: F.pad(bias, (0, -outputs % LANES))).data_ptr()
    return _Linear(held.data_ptr(), filled, inputs, outputs, low)


def take_native(
    library: ctypes.CDLL, backbone: BackboneWeights, head: HeadWeights, decoder: DecoderWeights | None, low: bool
) -> None:
    """Has the compiled arithmetic do what it can.

    Args:
        library: from :func:`pra.generate.native.library`.
        backbone: in float32, on the CPU, as the others.
        head: of the same model.
        decoder: likewise, if it has one.
        low: whether products are to be of bfloat16.
    """

    def product(weights: Prepared, linear: Linear) -> Linear:
        return linear._replace(native=NativeProduct(library, weights, linear, low))

    backbone.native = NativeTransformer(library, backbone, low)
    backbone.patch_in = product(backbone, backbone.patch_in)
    head.native, head.condition_in = NativeHead(library, head, low), product(head, head.condition_in)
    head.modulations = product(head, head.modulations)
    if decoder is not None:
        decoder.native = NativeTransformer(library, decoder, low)
        decoder.state_in = product(decoder, decoder.state_in)
        decoder.patch_out = product(decoder, decoder.patch_out)


class NativeProduct:
    """``x @ matrix + bias``.

    Args:
        library: from :func:`pra.generate.native.library`.
        weights: that keep a copy.
        linear: in float32, on the CPU.
        low: whether inputs and matrix are to be rounded to bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, weights: Prepared, linear: Linear, low: bool = False) -> None:
        self._held = weights.copies  # the structure has but addresses
        self._linear, self._outputs = _linear(weights, linear, low), linear.matrix.shape[1]
        self._call = _checked(library.pra_product, [_POINTER, _POINTER, _POINTER, _COUNT, _THREADS])

    def __call__(self, x: Tensor) -> Tensor:
        """``(rows, inputs)`` to ``(rows, outputs)``."""
        x, y = x.contiguous(), x.new_empty(len(x), self._outputs)
        self._call(ctypes.byref(self._linear), x.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads())
        return y


class NativeTransformer:
    """Tokens through a transformer.

    Args:
        library: from :func:`pra.generate.native.library`.
        weights: in float32, on the CPU.
        low: whether products are to be of bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, weights: TransformerWeights, low: bool) -> None:
        self._held = weights.copies, weights.blocks
        self.heads, self.norm, self.rotary = weights.heads, weights.norm, weights.rotary
        self._blocks = (_Block * len(weights.blocks))(
            *(
                _Block(
                    block.attention_norm.data_ptr(),
                    _linear(weights, block.qkv, low),
                    _linear(weights, block.out, low),
                    block.mlp_norm.data_ptr(),
                    _linear(weights, block.mlp_into, low),
                    _linear(weights, block.mlp_out, low),
                )
                for block in weights.blocks
            )
        )
        first = [_POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER, _COUNT, _COUNT]
        rest = [_POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _THREADS]
        self._call = _checked(library.pra_transformer, [*first, *rest])

    def __call__(self, x: Tensor, cache: KVCache | None, before: int) -> Tensor:
        """Tokens ``(B, T, width)`` behind ``before`` others to the same; their keys and values join the cache."""
        x = x.clone(memory_format=torch.contiguous_format)
        own, other = self.rotary[:, before]
        self._call(
            self._blocks,
            len(self._blocks),
            self.norm.data_ptr(),
            self.heads,
            x.shape[2],
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            own.data_ptr(),
            other.data_ptr(),
            None if cache is None else cache.keys.data_ptr(),
            None if cache is None else cache.values.data_ptr(),
            0 if cache is None else cache.keys.shape[3],
            before,
            torch.get_num_threads(),
        )
        return x


class NativeHead:
    """What the head predicts at one evaluation.

    Args:
        library: from :func:`pra.generate.native.library`.
        weights: in float32, on the CPU.
        low: whether products are to be of bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, weights: HeadWeights, low: bool) -> None:
        self._held = weights.copies, weights.blocks
        self._blocks = (_HeadBlock * len(weights.blocks))(
            *(
                _HeadBlock(
                    block.norm.data_ptr(),
                    block.norm_bias.data_ptr(),
                    _linear(weights, block.into, low),
                    _linear(weights, block.out, low),
                    block.modulation,
                )
                for block in weights.blocks
            )
        )
        self._state_in, self._out = _linear(weights, weights.state_in, low), _linear(weights, weights.out, low)
        first = [_POINTER, _COUNT, _POINTER, _POINTER, _POINTER, _COUNT, _COUNT]
        self._call = _checked(library.pra_head, [*first, _POINTER, _COUNT, _POINTER, _THREADS])
        self._context = _checked(library.pra_context, [_POINTER, _COUNT, _POINTER, _COUNT, _COUNT, _POINTER])
        self._normalise = _checked(library.pra_normalise, [_POINTER, _COUNT, _COUNT, _POINTER])

    def context(self, times: Tensor, condition: Tensor) -> Tensor:
        """``silu(times + condition)`` of ``(K, width)`` and ``(rows, width)``: ``(K * rows, width)``.

        In torch's own a number's last digit depends on its place in memory.
        """
        times, condition = times.contiguous(), condition.contiguous()
        (count, width), rows = times.shape, len(condition)
        y = times.new_empty(count * rows, width)
        self._context(times.data_ptr(), count, condition.data_ptr(), rows, width, y.data_ptr())
        return y

    def normalise(self, states: Tensor) -> Tensor:
        """States ``(B, d)`` as :meth:`pra.models.states.StateCodec.normalise` does them.

        torch's own has all its threads share even a few rows, and they go on waiting for more work on cores that ours
        would have: two threads took longer than one.
        """
        states, normalised = states.contiguous(), torch.empty_like(states, memory_format=torch.contiguous_format)
        self._normalise(states.data_ptr(), *states.shape, normalised.data_ptr())
        return normalised

    def __call__(self, z: Tensor, modulated: Tensor, streams: int) -> Tensor:
        """States ``(B, d)`` to ``(streams * B, d)``; ``modulated`` has a row for each of these."""
        z, rows = z.contiguous(), streams * len(z)
        prediction = z.new_empty(rows, z.shape[1])
        self._call(
            self._blocks,
            len(self._blocks),
            ctypes.byref(self._state_in),
            ctypes.byref(self._out),
            z.data_ptr(),
            len(z),
            rows,
            modulated.data_ptr(),
            modulated.shape[1],
            prediction.data_ptr(),
            torch.get_num_threads(),
        )
        return prediction
