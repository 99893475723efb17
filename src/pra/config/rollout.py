"""How the inputs of the AR pass are made (:mod:`pra.method.rollout`)."""

from __future__ import annotations

from dataclasses import dataclass

from pra.config.checks import PositiveFloat, PositiveInt, Settings, Share, within


@dataclass(frozen=True, kw_only=True)
class Clean(Settings):
    """Teacher forcing: the true patches."""


@dataclass(frozen=True, kw_only=True)
class Noised(Settings):
    """The true patches plus Gaussian noise of standard deviation ``sigma`` (pixels in [-1, 1])."""

    sigma: PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Reconstructed(Settings):
    """Decoded from the unperturbed states."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Settings):
    """PRA: decoded from states perturbed to ``t_i ~ U(t_min, 1)``, independently per position."""

    t_min: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class Exact(Settings):
    """Sequential: the model itself completes each state from ``t_i ~ U(t_min, t_max)``, on its own prefix.

    ``t_max = 0`` is free-running sampling. Above 0 a state starts from the part-noised true one, which keeps
    the rollout tied to the image whose states are the training targets.
    """

    t_min: Share = 0.0
    t_max: Share = 1.0
    steps: PositiveInt = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        within(0.0, self.t_max)(self.t_min, "t_min")


Rollout = Clean | Noised | Reconstructed | Parallel | Exact
