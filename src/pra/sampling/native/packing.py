"""Weights as the compiled arithmetic reads them: copies in panels, at addresses that stay."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.sampling.native.build import library

LANES = 16
"""Outputs side by side in a panel of a matrix."""

DEEP = 32
"""In bfloat16 a matrix has a multiple of so many inputs."""

POINTER, COUNT, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class LinearStruct(ctypes.Structure):
    """``Linear`` of ``products.h``."""

    _fields_: ClassVar = [
        *(("panels", POINTER), ("bias", POINTER), ("inputs", COUNT), ("outputs", COUNT), ("bfloat16", COUNT))
    ]


class Packed:
    """Copies of weights, renewed in place: the compiled arithmetic holds their addresses.

    With ``low``, products multiply bfloat16 numbers.
    """

    def __init__(self, low: bool) -> None:
        self.low = low
        self._copies: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def refresh(self) -> None:
        """Take over the model's present weights."""
        for kept, source in self._copies:
            kept.copy_(source())

    def kept(self, source: Callable[[], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a copy of what ``source`` gives, now and at every :meth:`refresh`."""
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
    """``(inputs, outputs)`` as ``(ceil(outputs / LANES), inputs, LANES)``, filled up with zeros."""
    filled = F.pad(matrix, (0, -matrix.shape[1] % LANES)).contiguous()
    return filled.view(len(matrix), -1, LANES).transpose(0, 1).contiguous()


def pairs(matrix: Tensor) -> Tensor:
    """``(inputs, outputs)`` as ``(ceil(outputs / LANES), inputs' / 2, LANES, 2)``, two inputs of an output together.

    Filled up with zeros, the inputs to a multiple of ``DEEP``.
    """
    filled = panels(F.pad(matrix, (0, 0, 0, -len(matrix) % DEEP)))
    return filled.view(len(filled), -1, 2, LANES).transpose(2, 3).contiguous()


def content_hash(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """Hash the numbers in each tensor; ``None`` unless all are contiguous float32 on the CPU.

    torch's own count of changes leaves out fused optimizers and ``.data``.
    """
    hashed = list(tensors)
    if any(t.device.type != "cpu" or t.dtype is not torch.float32 or not t.is_contiguous() for t in hashed):
        return None
    found = library()
    if found is None:
        return None
    found.pra_hash.argtypes, found.pra_hash.restype = [POINTER, COUNT], ctypes.c_uint64
    return tuple(int(found.pra_hash(tensor.data_ptr(), tensor.numel())) for tensor in hashed)
