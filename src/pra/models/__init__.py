"""The models: PRA (backbone, head, codec) and JiT. Modules here do not depend on optimisers or the command line."""

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
"""Modules that a model repeats. Training compiles, recomputes and shards each of them separately."""


def build_model(config: AnyModelConfig, seed: int | None = 0) -> Model:
    """Build a model. The initial weights depend on ``seed`` alone; None leaves them uninitialised, to be loaded."""
    return JiT(config, seed) if isinstance(config, JiTConfig) else PRA(config, seed)


def count_parameters(config: AnyModelConfig) -> dict[str, int]:
    """Count the parameters of each part, on the meta device."""
    with torch.device("meta"):
        model = build_model(config)
    parts = dict.fromkeys((name for name, _ in model.named_children()), 0)
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
