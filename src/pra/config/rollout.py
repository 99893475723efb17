"""How the inputs of the AR pass are made (:mod:`pra.method.rollout`)."""

from __future__ import annotations

from dataclasses import dataclass

from pra.config.checks import between, coerce, positive


@dataclass(frozen=True, kw_only=True)
class Clean:
    """Teacher forcing: the true patches."""


@dataclass(frozen=True, kw_only=True)
class Noised:
    """The true patches plus Gaussian noise of standard deviation ``sigma`` (pixels in [-1, 1])."""

    sigma: float

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "sigma")


@dataclass(frozen=True, kw_only=True)
class Reconstructed:
    """Decoded from the unperturbed states."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """PRA: decoded from states perturbed to ``t_i ~ U(t_min, 1)``, independently per position."""

    t_min: float = 0.0

    def __post_init__(self) -> None:
        coerce(self)
        between(self, "t_min", 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Sequential: the model itself completes each state from ``t_i ~ U(t_min, t_max)``, on its own prefix.

    ``t_max = 0`` is free-running sampling. Above 0 a state starts from the part-noised true one, which keeps
    the rollout tied to the image whose states are the training targets.
    """

    t_min: float = 0.0
    t_max: float = 1.0
    steps: int = 4

    def __post_init__(self) -> None:
        coerce(self)
        positive(self, "steps")
        between(self, "t_max", 0.0, 1.0)
        between(self, "t_min", 0.0, self.t_max)


Rollout = Clean | Noised | Reconstructed | Parallel | Exact
