"""One token's arithmetic in as few operations as it takes: a transformer's step, and the head's field.

The formulas are the modules' own (:mod:`pra.models`), fused: rows ``(B, width)`` without a length, one rotation for
queries and keys, the modulations of many evaluations in one product. Nothing here asks the device for a number, nor
depends on the position but through tensors, so that a CUDA graph can hold it. Products run in the dtype of their
matrices; all else is float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pra import flow
from pra.config import Prediction
from pra.generate.prepared import BlockWeights, HeadWeights, Linear, TransformerWeights
from pra.nn.transformer import KVCache

EPSILON = 1e-6
"""Of every norm in the models."""

_EPSILON = torch.tensor(EPSILON, device="cpu")

MODULATED_ROWS = 1024
"""Rows whose modulations are worked out together: enough to fill a device, few enough to stay in its cache."""


class Place(NamedTuple):
    """A token's place in its sequence: ``token`` ``(1,)``, and how many tokens of the cache attention looks at.

    ``mask`` ``(1, 1, 1, bound)``, of the cache's dtype, is added to the scores: 0, and minus infinity where a token is
    not there yet. It is None where ``bound`` counts exactly those that are.
    """

    token: Tensor
    bound: int
    mask: Tensor | None


def product(x: Tensor, linear: Linear) -> Tensor:
    """``x @ matrix + bias`` of ``(rows, width)``, in the matrix's dtype; float32 comes back as float32."""
    matrix, bias, native = linear
    if native is not None:
        return native(x)
    inputs = _cast(x, matrix.dtype)
    return _cast(torch.mm(inputs, matrix) if bias is None else torch.addmm(bias, inputs, matrix), x.dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking torch to do nothing takes as long as a small operation.
    return x if x.dtype is dtype else x.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """RMSNorm over the last size."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, EPSILON)
    # On a CPU torch's own is eleven operations, where these are four.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x = x * torch.addcmul(_EPSILON, length, length, value=1 / x.shape[-1]).rsqrt_()
    return x if weight is None else x * weight


def transformer_step(weights: TransformerWeights, x: Tensor, cache: KVCache | None, here: Place) -> Tensor:
    """:class:`pra.nn.transformer.Transformer` of one token, ``(B, width)`` to the same, after those in the cache.

    Without a cache the token is a sequence of its own: attention returns its value.
    """
    if weights.native is not None:
        return weights.native(x.unsqueeze(1), cache, here.bound - 1).squeeze(1)
    if cache is None:
        for block in weights.blocks:
            value = product(rms_norm(x, block.attention_norm), block.qkv).chunk(3, dim=-1)[2]
            x = _mlp(block, x + product(value, block.out))
        return rms_norm(x, weights.norm)
    own, other = weights.rotary.index_select(1, here.token).squeeze(1)
    layers = zip(
        weights.blocks,
        own,
        other,
        cache.keys,
        cache.values,
        cache.keys[:, :, :, : here.bound],
        cache.values[:, :, :, : here.bound],
        strict=True,
    )
    for block, cos, sin, all_keys, all_values, keys, values in layers:
        qkv = product(rms_norm(x, block.attention_norm), block.qkv).view(len(x), 3, weights.heads, 1, -1)
        qk = rms_norm(qkv[:, :2])
        qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
        query, key = _cast(qk, keys.dtype).unbind(1)
        all_keys.index_copy_(2, here.token, key)
        all_values.index_copy_(2, here.token, _cast(qkv[:, 2], values.dtype))
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=here.mask)
        x = _mlp(block, x + product(y.reshape(x.shape), block.out))
    return rms_norm(x, weights.norm)


def _mlp(block: BlockWeights, x: Tensor) -> Tensor:
    return x + _swiglu(rms_norm(x, block.mlp_norm), block.mlp_into, block.mlp_out)


def _swiglu(x: Tensor, into: Linear, out: Linear) -> Tensor:
    gate, value = product(x, into).chunk(2, dim=-1)
    return product(F.silu(gate) * value, out)


def modulated_groups(streams: Sequence[int], batch: int) -> Iterator[tuple[int, int, int]]:
    """Evaluations whose modulations are worked out together: first, last (not in it), and the streams of each.

    Args:
        streams: of every evaluation.
        batch: rows of each stream.
    """
    first = 0
    for count, members in groupby(streams):
        end, most = first + len(list(members)), max(1, MODULATED_ROWS // (count * batch))
        for start in range(first, end, most):
            yield start, min(start + most, end), count
        first = end


class Field:
    """The head's velocity at one position: a :data:`pra.solvers.Velocity` of states ``(B, d)``.

    It must be asked as often as there are evaluations, at their times, in order.

    Args:
        weights: prepared for these evaluations.
        condition: ``(B, width)``, or ``(2 B, width)`` with the null class's behind, from
            :meth:`pra.models.head.FlowHead.condition`.
        streams: 2 for each evaluation that is guided, 1 for the others.
        scale: of guidance, a tensor of one number.
    """

    def __init__(self, weights: HeadWeights, condition: Tensor, streams: Sequence[int], scale: Tensor) -> None:
        self.weights, self.condition, self.streams, self.scale = weights, condition, streams, scale
        self.asked = 0
        self.ready: list[Tensor] = []

    def __call__(self, z: Tensor, t: float) -> Tensor:
        """The guided velocity ``(B, d)``."""
        if not self.ready:
            self.ready = self._modulations(len(z))
        modulated, streams = self.ready.pop(0), self.streams[self.asked]
        self.asked += 1
        predict = self.weights.native or self._predict
        prediction = predict(z, modulated, streams)
        if streams == 2:
            conditional, unconditional = prediction.chunk(2)
            prediction = torch.addcmul(unconditional, self.scale, conditional - unconditional)
        if self.weights.prediction is Prediction.DATA:
            return flow.velocity_from_data(prediction, z, torch.tensor(t))
        return prediction

    def _predict(self, z: Tensor, modulated: Tensor, streams: int) -> Tensor:
        weights = self.weights
        parts = torch.split(modulated, weights.width, dim=-1)
        x = product(z, weights.state_in)
        if streams == 2:
            x = x.repeat(2, 1)
        for block in weights.blocks:
            shift, scale, gate = parts[3 * block.modulation : 3 * block.modulation + 3]
            normed = F.layer_norm(x, (weights.width,), block.norm, block.norm_bias, EPSILON)
            x = torch.addcmul(x, gate, _swiglu(torch.addcmul(shift, normed, scale), block.into, block.out))
        shift, scale = parts[-2:]
        normed = F.layer_norm(x, (weights.width,), eps=EPSILON)
        return product(torch.addcmul(shift, normed, scale), weights.out)

    def _modulations(self, batch: int) -> list[Tensor]:
        """Of the next evaluations, ``(streams * B, ...)`` each."""
        first, last, streams = next(group for group in modulated_groups(self.streams, batch) if group[0] == self.asked)
        rows = streams * batch
        times, condition, native = self.weights.times[first:last], self.condition[:rows], self.weights.native
        if native is not None:
            context = native.context(times, condition)
        else:
            context = F.silu(times.unsqueeze(1) + condition).flatten(0, 1)
        modulated = product(context, self.weights.modulations)
        return list(torch.split(modulated, rows))
