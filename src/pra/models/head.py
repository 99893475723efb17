"""The head ``v(z_t, t, h_i)``: a flow-matching MLP over the low-dimensional state of one token.

Residual MLP blocks under AdaLN (arXiv 2212.09748), as in MAR (arXiv 2406.11838) and SphereAR.
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
"""Smallest ``1 - t`` by which an x-prediction is divided to become a velocity, as in JiT (arXiv 2511.13720)."""

Modulations: TypeAlias = list[Tensor]
"""Outputs of the AdaLN projections (:meth:`FlowHead.modulate`)."""


def velocity_from_data(z: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """Return the velocity ``(z - z_t) / (1 - t)`` from ``z_t`` at time ``t`` to a predicted ``z`` at time 1.

    ``1 - t`` is clamped to at least :data:`MIN_REMAINING_TIME`.
    """
    return (z - z_t) / (1 - t).clamp(min=MIN_REMAINING_TIME)


def time_features(t: Tensor) -> Tensor:
    """Return cosines and sines of times ``t`` in [0, 1]: ``(..., 2 * TIME_FREQUENCIES)`` (DDPM's embedding)."""
    exponents = torch.arange(TIME_FREQUENCIES, device=t.device) / TIME_FREQUENCIES
    angles = 1000.0 * t.float().unsqueeze(-1) * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def time_mlp(width: int) -> nn.Sequential:
    """Build an MLP from :func:`time_features` to ``width``."""
    return nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))


class HeadBlock(nn.Module):
    """A residual block ``x + gate * swiglu((1 + scale) * norm(x) + shift)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, 3 * width // 2, bias=True)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Map ``(..., width)`` to the same shape. ``modulation`` holds shift, scale and gate, ``(..., width)`` each."""
        shift, scale, gate = modulation
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class FlowHead(nn.Module):
    """The velocity of a state at flow time ``t``, given the backbone's condition.

    With ``spans`` the head also reads the span of a step, and returns the mean velocity over it. With
    ``config.head.shortcut_guidance`` such a head also reads the guidance scale, and returns guided velocities.
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
        """Project a condition ``(..., D)`` to ``(..., width)``, once for all evaluations."""
        return self.condition_in(h)  # type: ignore[no-any-return]

    def embed(self, t: Tensor, span: Tensor | None = None) -> Tensor:
        """Embed the time ``t`` and, for a head with spans, a step's ``span``: ``(...)`` to ``(..., width)``."""
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
        """Return the shifts, scales and gates of all blocks.

        Args:
            embedded: ``(..., width)`` from :meth:`embed`.
            condition: ``(..., width)`` from :meth:`project`; broadcasts with ``embedded``.

        Returns:
            ``(..., 3 width)`` for each projection of the blocks, then ``(..., 2 width)`` for the last layer.
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
            span: shaped as ``t``, for a head with ``spans``.
            modulations: from :meth:`modulate` for these times, spans and conditions; computed by default.
            scale: guidance scales shaped as ``t``, for a head that reads them.
        """
        if modulations is None:
            embedded = self.embed(t, span)
            if scale is not None:
                embedded = embedded + self.embed_scale(scale)
            modulations = self.modulate(embedded, condition)
        *shared, last = modulations
        # Keep the residual stream in float32 under autocast, as in every transformer here.
        x = self.state_in(z_t)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for index, block in enumerate(self.blocks):
            x = block(x, shared[index * len(shared) // len(self.blocks)].chunk(3, dim=-1))
        final_shift, final_scale = last.chunk(2, dim=-1)
        prediction = self.out(self.final_norm(x) * (1 + final_scale) + final_shift).float()
        if self.prediction is Prediction.DATA:
            return velocity_from_data(prediction, z_t, t.unsqueeze(-1))
        return prediction  # type: ignore[no-any-return]
