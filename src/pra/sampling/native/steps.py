"""The steps of :mod:`pra.sampling.algorithm` by the compiled arithmetic, and the models that it may be used for."""

from __future__ import annotations

import enum
import functools
import re
from typing import Any

import torch
from torch import Tensor, nn

from pra.config import AnyModelConfig, SamplingConfig
from pra.models import PRA, build_model
from pra.models.states import StateCodec
from pra.sampling.algorithm import Steps
from pra.sampling.native.build import SWITCH, library
from pra.sampling.native.packing import Packed, content_hash
from pra.sampling.native.parts import NativeHead, NativeLinear, NativeNorm, NativeTransformer

_LINEAR = ("weight", "bias")
_TRANSFORMER = {
    *("blocks.N.attention_norm.weight", "blocks.N.attention.qkv.weight", "blocks.N.attention.out.weight"),
    *("blocks.N.attention.query_norm.weight", "blocks.N.attention.key_norm.weight"),
    *("blocks.N.mlp_norm.weight", "blocks.N.mlp.into.weight", "blocks.N.mlp.out.weight", "norm.weight"),
}
_AROUND = {f"{layer}.{name}" for layer in ("patch_in", "state_in", "out") for name in _LINEAR}
_IN_TRANSFORMER = {f"transformer.{name}" for name in _TRANSFORMER}
_HEAD = {
    f"{layer}.{name}"
    for layer in (
        *("state_in", "condition_in", "time_in.N", "span_in.N", "blocks.N.norm", "blocks.N.mlp.into"),
        *("blocks.N.mlp.out", "modulations.N", "final_modulation", "out"),
    )
    for name in _LINEAR
}
KNOWN = {
    "backbone": {"next_position"} | _IN_TRANSFORMER | _AROUND,
    "head": _HEAD,
    "shortcut": _HEAD,
    "codec.decoder": _IN_TRANSFORMER | _AROUND,
}
"""The parameters that the compiled arithmetic reads, by part, numbers written N: no others may be there. All else
(condition, encoder) is run by its modules anyway."""

PLAIN = (int, float, str, bool, tuple, enum.Enum, type(None))
"""Types of attributes that are compared with those of a new model."""


def unsupported(model: PRA) -> str | None:
    """Why the compiled arithmetic must not stand in for a model's modules; ``None`` where it may.

    It may where every module of the parts that it replaces has the parameters that it knows, and is exactly what the
    configuration builds: the same class under the same name, with the same plain attributes and shapes, without hooks,
    without a method of its own.
    """
    parameters = dict(model.named_parameters())
    if any(parameter.device.type != "cpu" for parameter in parameters.values()):
        return "the model is not on the CPU"
    if any(p.dtype is not torch.float32 or not p.is_contiguous() for p in parameters.values()):
        return "its weights are not contiguous float32"
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "a hook is registered on all modules"
    reference = _reference(model.config)
    changed = _changed("the model", model, reference) or _changed(
        "codec", model.codec, reference.get_submodule("codec")
    )
    for name, known in KNOWN.items():
        part = _part(model, name)
        if part is None or changed is not None:
            continue
        strange = {re.sub(r"\b\d+\b", "N", one) for one, _ in part.named_parameters()} - known
        changed = f"{name}.{min(strange)} is not known" if strange else _all_changed(name, part, _part(reference, name))
    if changed is not None:
        return changed
    return None if library() is not None else f"there is no C++ compiler, or {SWITCH}=0"


def _part(model: nn.Module, name: str) -> nn.Module | None:
    """A part of a model by its name; ``None`` where the model has no such part."""
    return dict(model.named_modules()).get(name)


def _all_changed(part: str, found: nn.Module, expected: nn.Module | None) -> str | None:
    """What differs between a part of a model and that of a new one."""
    there, built = dict(found.named_modules()), dict(expected.named_modules()) if expected is not None else {}
    if built.keys() != there.keys():
        return f"{part}.{min(built.keys() ^ there.keys())} is not as the configuration builds it"
    names = ((name, f"{part}.{name}" if name else part) for name in there)
    return next((said for name, full in names if (said := _changed(full, there[name], built[name]))), None)


def _changed(name: str, module: nn.Module, expected: nn.Module) -> str | None:
    """What differs between a module, without its children, and that of a new model."""
    if type(module) is not type(expected):
        return f"{name} is a {type(module).__name__}, not a {type(expected).__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has a forward hook"
    return None if _plain(module) == _plain(expected) else f"{name} has changed attributes"


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that decide what it computes: plain values, shapes of parameters, own callables."""
    own = {name: value for name, value in vars(module).items() if name not in ("training", "sampling", "classes")}
    plain = {name: value for name, value in own.items() if isinstance(value, PLAIN) or callable(value)}
    return plain | {name: p.shape for name, p in module.named_parameters(recurse=False)}


@functools.lru_cache(maxsize=8)
def _reference(config: AnyModelConfig) -> nn.Module:
    """A new model of a configuration, without memory."""
    with torch.device("meta"):
        return build_model(config, seed=None)


class NativeSteps(Steps):
    """Steps for a model that :func:`unsupported` has nothing against.

    Args:
        model: in float32 on the CPU.
        config: as of :class:`pra.sampling.algorithm.Steps`.
        batch: likewise.
        low: whether products multiply bfloat16 numbers.
    """

    def __init__(self, model: PRA, config: SamplingConfig, batch: int, low: bool) -> None:
        super().__init__(model, config, batch)
        found = library()
        assert found is not None, "asked without looking whether it is supported"
        self._library, self._packed = found, Packed(low)
        self._patch_in, self._transformer = self._part(model.backbone.patch_in, model.backbone.transformer)
        self.head: Any = NativeHead(found, self._packed, self.head)
        self._decoder: tuple[NativeLinear, NativeTransformer, NativeLinear] | None = None
        if isinstance(model.codec, StateCodec):
            decoder = model.codec.decoder
            out = NativeLinear(found, self._packed.layer(decoder.out))
            self._decoder = (*self._part(decoder.state_in, decoder.transformer), out)
        self._normalise = NativeNorm(found)
        self._parameters = list(model.parameters())
        self._content = content_hash(self._parameters)

    def _part(self, into: nn.Linear, transformer: Any) -> tuple[NativeLinear, NativeTransformer]:
        linear = NativeLinear(self._library, self._packed.layer(into))
        return linear, NativeTransformer(self._library, self._packed, transformer)

    def begin(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """As in :class:`Steps`; true patches are read by the model's own modules, many at once."""
        content = content_hash(self._parameters)
        if content != self._content:
            self._content, self.embedded = content, None
            self._packed.refresh()
        if prefix.shape[1]:
            return super().begin(tokens, prefix)
        self.reset()
        h = self._transformer(tokens, self.backbone_cache)
        return h[:, -1:] + self.model.backbone.next_position[0]

    def embed(self) -> None:
        """As in :class:`Steps`, when the weights have changed."""
        if self.embedded is None:
            super().embed()

    def read(self, patch: Tensor) -> Tensor:
        """As in :class:`Steps`."""
        x = self._patch_in(patch).repeat(self.streams, 1, 1)
        position = self.backbone_cache.positions(1, 1 - self.model.backbone.prefix)
        return self._transformer(x, self.backbone_cache) + self.model.backbone.next_position[position]

    def write(self, state: Tensor) -> Tensor:
        """As in :class:`Steps`."""
        if self._decoder is not None:
            into, transformer, out = self._decoder
            state = out(transformer(into(state), self.decoder_cache))
        return state.clamp(-1.0, 1.0)

    def normalise(self, state: Tensor) -> Tensor:
        """As in :class:`Steps`."""
        return self._normalise(state) if self._decoder is not None else state
