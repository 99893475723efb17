"""The models: PRA (backbone, head, states and their composition) and JiT. They know no optimiser, path, device or
command line."""

from __future__ import annotations

import torch

from pra.config import AnyModelConfig, JiTConfig
from pra.models.head import HeadBlock
from pra.models.jit import JiT, ModulatedBlock
from pra.models.pra import PRA
from pra.models.states import ResidualMLP
from pra.models.transformer import Block

__all__ = ["BLOCKS", "PRA", "JiT", "Model", "build_model", "count_parameters"]

Model = PRA | JiT

BLOCKS = (Block, ModulatedBlock, HeadBlock, ResidualMLP)
"""Classes of modules that a model repeats; training compiles, recomputes and shards each of them by itself."""


def build_model(config: AnyModelConfig, seed: int | None = 0) -> Model:
    """The model that a configuration asks for, its initial weights a function of ``seed``.

    With None it has none: they are left as memory is, for ``load_state_dict`` to set, and not a number is drawn.
    """
    return JiT(config, seed) if isinstance(config, JiTConfig) else PRA(config, seed)


def count_parameters(config: AnyModelConfig) -> dict[str, int]:
    """Parameters by part, counted on a model without memory (the meta device)."""
    with torch.device("meta"):
        model = build_model(config)
    parts = dict.fromkeys((name for name, _ in model.named_children()), 0)
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
