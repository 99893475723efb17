"""JiT, the diffusion baseline: "Just image Transformer" (Li and He, arXiv 2511.13720), built from the parts of PRA.

It predicts the clean image ``x``; training and sampling convert the prediction to a velocity. Unlike the paper's JiT
it has a learned position per token beside the rotary embedding, and class tokens from the first block on. It does not
have dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import JiTConfig
from pra.models.base import ImageModel, NoDraws, initialise
from pra.models.head import time_features, time_mlp, velocity_from_data
from pra.models.text import condition_of
from pra.models.transformer import Attention, RMSNorm, SwiGLU, raster_positions, rotary_table


class ModulatedBlock(nn.Module):
    """A transformer block under adaLN-Zero (DiT, arXiv 2212.09748); 18 width^2 parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=False)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 8 * width // 3)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, rotary: Tensor, context: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to the same shape; ``context`` is ``(B, 1, width)``."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(context).chunk(6, dim=-1)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, rotary)
        return x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)  # type: ignore[no-any-return]


class JiT(ImageModel):
    """The velocity of a whole image at flow time ``t``, given its class.

    The initial weights depend on ``seed`` alone; None leaves them uninitialised, to be loaded.
    """

    config: JiTConfig
    rotary: Tensor

    def __init__(self, config: JiTConfig, seed: int | None = 0) -> None:
        super().__init__(config)
        width, heads = config.transformer.width, config.transformer.heads
        self.prefix = prefix = config.class_tokens + config.text_tokens
        with NoDraws():
            self.patch_in: nn.Module = nn.Linear(config.patch_dim, width)
            if config.bottleneck is not None:
                first = nn.Linear(config.patch_dim, config.bottleneck, bias=False)
                self.patch_in = nn.Sequential(first, nn.Linear(config.bottleneck, width))
            self.condition = condition_of(config, 1, width)
            self.time_in = time_mlp(width)
            self.position = nn.Parameter(torch.empty(prefix + config.num_patches, width))
            self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(config.transformer.depth))
            self.final_norm = RMSNorm(width, eps=1e-6)
            self.final_modulation = nn.Linear(width, 2 * width)
            self.out = nn.Linear(width, config.patch_dim)
        table = rotary_table(raster_positions(config.grid, prefix), width // heads)
        self.register_buffer("rotary", table, persistent=False)
        # Every block begins as the identity, and the predicted image as grey.
        modulations = [block.modulation for block in self.blocks if isinstance(block, ModulatedBlock)]
        if seed is not None:
            zeros = [*modulations, self.final_modulation, self.out]
            initialise(self, seed, [self.position, *self.condition.embeddings], zeros)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Return the velocity ``dx/dt`` at ``x_t``: ``(B, N, P)``, float32.

        Args:
            x_t: ``(B, N, P)``, noised patches.
            t: in [0, 1], 0 pure noise and 1 the image; ``(B, 1)``, or ``(1, 1)`` for all.
            labels: ``(B,)``, or rows ``(B, 1 + L)`` of a class and a caption.
            prefix: the condition's tokens of these labels; computed by default.
        """
        prefix = self.condition(labels) if prefix is None else prefix
        classes, text = prefix[:, :1], prefix[:, 1:]
        context = self.time_in(time_features(t)) + classes
        if self.config.text is not None:
            context = context + text.mean(dim=1, keepdim=True)
        context = F.silu(context)
        tokens = torch.cat([classes.expand(-1, self.config.class_tokens, -1), text, self.patch_in(x_t)], dim=1)
        h = tokens + self.position  # float32, under autocast too
        for block in self.blocks:
            h = block(h, self.rotary, context)
        shift, scale = self.final_modulation(context).chunk(2, dim=-1)
        h = self.final_norm(h[:, self.prefix :]) * (1 + scale) + shift
        return velocity_from_data(self.out(h).float(), x_t, t.unsqueeze(-1))

    def read(self, labels: Tensor, patches: Tensor, t: Tensor | None = None) -> None:
        """Run the blocks over patches at flow time ``t``."""
        assert t is not None, "JiT reads noised patches"
        self(patches, t, labels)
