"""The steps of :mod:`pra.sampling.algorithm` by the compiled arithmetic, and a check of the models that it can run."""

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
from pra.sampling.native import parts
from pra.sampling.native.build import SWITCH, library

_TRANSFORMER = (
    r"transformer\.(norm|blocks\.\d+\.(attention_norm|mlp_norm|mlp\.(into|out)|"
    r"attention\.(qkv|out|query_norm|key_norm)))\.weight"
)
_HEAD = (
    r"(state_in|condition_in|time_in\.\d|span_in\.\d|scale_in\.\d|blocks\.\d+\.(norm|mlp\.(into|out))|modulations\.\d+|"
    r"final_modulation|out)\.(weight|bias)"
)
PARTS = re.compile(r"(backbone|head|shortcut|codec\.decoder)\b")
"""The parts of a model that the compiled arithmetic replaces. Condition and encoder run by their own modules."""

KNOWN = re.compile(
    rf"(backbone|codec\.decoder)\.({_TRANSFORMER}|(patch_in|state_in|out)\.(weight|bias))|"
    rf"backbone\.next_position|(head|shortcut)\.{_HEAD}"
)
"""The parameters that the compiled arithmetic reads. The replaced parts must not hold other parameters."""

DESCRIPTIONS = ("training", "sampling", "classes", "captions")
"""Attributes of a model that do not change its arithmetic."""

PLAIN = (int, float, str, bool, tuple, enum.Enum, type(None))
"""Types of attributes that are compared with those of a new model."""


def unsupported(model: PRA) -> str | None:
    """Return the reason why the compiled arithmetic must not replace a model's modules; ``None`` if it may.

    A replaced module must have known parameters only, and be exactly what the configuration builds. It has the same
    class, name, plain attributes and shapes, and does not have hooks or methods of its own.
    """
    parameters = dict(model.named_parameters())
    if any(parameter.device.type != "cpu" for parameter in parameters.values()):
        return "the model is not on the CPU"
    if any(p.dtype is not torch.float32 or not p.is_contiguous() for p in parameters.values()):
        return "its weights are not contiguous float32"
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return "a hook is registered on all modules"
    for name in parameters:
        if PARTS.match(name) and not KNOWN.fullmatch(name):
            return f"{name} is not known"
    found, expected = _replaced(model), _replaced(reference(model.config))
    if found.keys() != expected.keys():
        return f"{min(found.keys() ^ expected.keys())} is not as the configuration builds it"
    for name, module in found.items():
        if changed := _changed(name or "the model", module, expected[name]):
            return changed
    return None if library() is not None else f"there is no C++ compiler, or {SWITCH}=0"


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose work the compiled arithmetic does, by name; the model and its codec among them."""
    return {name: module for name, module in model.named_modules() if name in ("", "codec") or PARTS.match(name)}


def _changed(name: str, module: nn.Module, expected: nn.Module) -> str | None:
    """Describe a difference between a module, without its children, and the module of a new model, if any."""
    if type(module) is not type(expected):
        return f"{name} is a {type(module).__name__}, not a {type(expected).__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has a forward hook"
    return None if _plain(module) == _plain(expected) else f"{name} has changed attributes"


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that decide a module's arithmetic: plain ones, its own callables, shapes of parameters."""
    own = {name: value for name, value in vars(module).items() if name not in DESCRIPTIONS}
    plain = {name: value for name, value in own.items() if isinstance(value, PLAIN) or callable(value)}
    return plain | {name: p.shape for name, p in module.named_parameters(recurse=False)}


@functools.lru_cache(maxsize=8)
def reference(config: AnyModelConfig) -> nn.Module:
    """Build a new model on the meta device, without memory."""
    with torch.device("meta"):
        return build_model(config, seed=None)


class NativeSteps(Steps):
    """Steps for a model for which :func:`unsupported` returns ``None``. With ``low``, products multiply bfloat16."""

    def __init__(self, model: PRA, config: SamplingConfig, batch: int, low: bool) -> None:
        super().__init__(model, config, batch)
        found = library()
        assert found is not None, "asked without looking whether it is supported"
        self._library, self._packed = found, parts.Packed(low)
        self._patch_in, self._transformer = self._part(model.backbone.patch_in, model.backbone.transformer)
        self.head: Any = parts.NativeHead(found, self._packed, self.head)
        self._decoder: tuple[parts.NativeLinear, parts.NativeTransformer, parts.NativeLinear] | None = None
        if isinstance(model.codec, StateCodec):
            decoder = model.codec.decoder
            out = parts.NativeLinear(found, self._packed.layer(decoder.out))
            self._decoder = (*self._part(decoder.state_in, decoder.transformer), out)
            # Without context a group is a sequence of its own: one step fills a cache, and the next step overwrites it.
            alone = decoder.transformer.group > 1 and self.decoder_cache is None
            self._seen = decoder.transformer.new_cache(batch) if alone else self.decoder_cache
        self._normalise = parts.checked(found.pra_normalise, [parts.POINTER, parts.COUNT, parts.COUNT, parts.POINTER])
        self._parameters = list(model.parameters())
        self._content = parts.content_hash(self._parameters)

    def _part(self, into: nn.Linear, transformer: Any) -> tuple[parts.NativeLinear, parts.NativeTransformer]:
        linear = parts.NativeLinear(self._library, self._packed.layer(into))
        return linear, parts.NativeTransformer(self._library, self._packed, transformer)

    def begin(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Begin as :class:`Steps` does. The model's own modules read true patches, many at once."""
        content = parts.content_hash(self._parameters)
        if content != self._content:
            self._content, self.at.embedded = content, None
            self._packed.refresh()
        if prefix.shape[1]:
            return super().begin(tokens, prefix)
        self.reset()
        h = self._transformer(tokens, self.backbone_cache)
        return h[:, -1:] + self.model.backbone.next_position[0]

    def embed(self) -> None:
        """Embed as :class:`Steps` does, if the weights have changed."""
        if self.at.embedded is None:
            super().embed()

    def read(self, patch: Tensor) -> Tensor:
        x = self._patch_in(patch).repeat(self.streams, 1, 1)
        position = self.backbone_cache.positions(1, 1 - self.model.backbone.prefix)
        return self._transformer(x, self.backbone_cache) + self.model.backbone.next_position[position]

    def write(self, state: Tensor) -> Tensor:
        if self._decoder is not None:
            into, transformer, out = self._decoder
            batch = len(state)
            single = state.reshape(batch, -1, self.model.config.state_dim)
            state = out(transformer(into(single), self._seen)).view(batch, 1, -1)
        return state.clamp(-1.0, 1.0)

    def normalise(self, state: Tensor) -> Tensor:
        if self._decoder is None:
            return state
        # Use one thread of our own: torch's threads would spin on the cores of our threads.
        state, width = state.contiguous(), self.model.config.state_dim
        normalised = torch.empty_like(state)
        self._normalise(state.data_ptr(), state.numel() // width, width, normalised.data_ptr())
        return normalised
