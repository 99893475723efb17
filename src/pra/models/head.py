"""The head ``v(z_t, t, h_i)``: a per-token flow-matching MLP over the low-dimensional state.

As in MAR (arXiv 2406.11838) and SphereAR: residual MLP blocks under AdaLN (arXiv 2212.09748).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pra.config import ModelConfig, Prediction
from pra.models.transformer import SwiGLU

TIME_FREQUENCIES = 128

MIN_REMAINING_TIME = 0.05
"""JiT (arXiv 2511.13720) divides by at least this where an x-prediction becomes a velocity."""

Modulations: TypeAlias = list[Tensor]
"""Outputs of the AdaLN projections, see :meth:`FlowHead.modulate`."""


def velocity_from_data(z: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """Return the velocity from ``z_t`` at ``t`` to a predicted ``z`` at 1: ``(z - z_t) / (1 - t)``."""
    return (z - z_t) / (1 - t).clamp(min=MIN_REMAINING_TIME)


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines of ``1000 t``, ``t`` in [0, 1]: ``(..., 2 * TIME_FREQUENCIES)`` (DDPM's embedding)."""
    exponents = torch.arange(TIME_FREQUENCIES, device=t.device) / TIME_FREQUENCIES
    angles = 1000.0 * t.float().unsqueeze(-1) * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def time_mlp(width: int) -> nn.Sequential:
    """From :func:`time_features` to ``width``."""
    return nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))


class HeadBlock(nn.Module):
    """``x + gate * swiglu((1 + scale) * norm(x) + shift)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 3 * width // 2, bias=True)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """``(..., width)`` to the same; shift, scale and gate are ``(..., width)`` each."""
        shift, scale, gate = modulation
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class FlowHead(nn.Module):
    """The velocity of a state at flow time ``t``, given the backbone's condition.

    With ``spans`` it is told the length of a step, and gives the mean velocity over it; and also the guidance scale,
    where ``config.head.shortcut_guidance`` says so, for guided velocities.
    """

    def __init__(self, config: ModelConfig, spans: bool = False) -> None:
        super().__init__()
        width, depth = config.head.width, config.head.depth
        self.prediction = config.head.prediction
        self.state_in = nn.Linear(config.group_state_dim, width)
        self.condition_in = nn.Linear(config.backbone.width, width)
        self.time_in = time_mlp(width)
        self.span_in = time_mlp(width) if spans else None
        self.scale_in = time_mlp(width) if spans and config.head.shortcut_guidance is not None else None
        self.blocks = nn.ModuleList(HeadBlock(width) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(config.head.modulations))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.group_state_dim)

    def zeros(self) -> list[nn.Linear]:
        """Return the layers whose weights start at zero."""
        return [m for m in (*self.modulations, self.final_modulation, self.out) if isinstance(m, nn.Linear)]

    def project(self, h: Tensor) -> Tensor:
        """Project a condition, once for all evaluations: ``(..., D)`` to ``(..., width)``."""
        return self.condition_in(h)  # type: ignore[no-any-return]

    def embed(self, t: Tensor, span: Tensor | None = None) -> Tensor:
        """Embed the time ``t`` and, where the head is told it, a step's ``span``: ``(..., width)``."""
        embedded: Tensor = self.time_in(time_features(t))
        if self.span_in is None:
            assert span is None, "a head of velocities was asked for a step"
            return embedded
        assert span is not None, "a head of steps was not told how long one is"
        return embedded + self.span_in(time_features(span))  # type: ignore[no-any-return]

    def embed_scale(self, scale: Tensor) -> Tensor:
        """Embed guidance scales of at least 1, to be added to :meth:`embed`: ``(...)`` to ``(..., width)``."""
        assert self.scale_in is not None, "this head is not told the guidance scale"
        return self.scale_in(time_features(1 - 1 / scale))  # type: ignore[no-any-return]

    def modulate(self, embedded: Tensor, condition: Tensor) -> Modulations:
        """Return the shifts, scales and gates of the blocks, one product per projection.

        ``embedded`` from :meth:`embed` and ``condition`` from :meth:`project`, both ``(..., width)``, broadcast. The
        results are ``(..., 3 width)`` of each projection of the blocks, then ``(..., 2 width)`` of the last layer.
        """
        context = F.silu(embedded + condition)
        return [projection(context) for projection in (*self.modulations, self.final_modulation)]

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        condition: Tensor,
        span: Tensor | None = None,
        modulations: Modulations | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity ``dz/dt`` at ``z_t``; with a ``span``, its mean over the path from ``t`` to ``t + span``.

        Args:
            z_t: ``(..., d)``.
            t: ``(...)`` in [0, 1], 0 pure noise and 1 the state; broadcasts against the leading sizes of ``z_t``.
            condition: ``(..., width)`` from :meth:`project`; broadcasts likewise.
            span: as ``t``, for a head with ``spans``.
            modulations: from :meth:`modulate` for these times, spans and conditions, where the caller has them.
            scale: of guidance, as ``t``, for a head that is told it.
        """
        if modulations is None:
            embedded = self.embed(t, span)
            modulations = self.modulate(embedded if scale is None else embedded + self.embed_scale(scale), condition)
        *shared, last = modulations
        # The residual stream is float32 under autocast, as in every transformer here.
        x = self.state_in(z_t)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for index, block in enumerate(self.blocks):
            x = block(x, shared[index * len(shared) // len(self.blocks)].chunk(3, dim=-1))
        shift, scale = last.chunk(2, dim=-1)
        prediction = self.out(self.final_norm(x) * (1 + scale) + shift).float()
        if self.prediction is Prediction.DATA:
            return velocity_from_data(prediction, z_t, t.unsqueeze(-1))
        return prediction  # type: ignore[no-any-return]
