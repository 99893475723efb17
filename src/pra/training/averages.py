"""Moving averages of the weights: the exponential one, ``ema``, and power-function ones, such as ``power-0.05``.

Power-function averages are those of arXiv 2312.02696, section 3.1 and appendix C. Their length is relative: a profile
of length 0.05 has a standard deviation of 5 % of the training so far, whatever its number of steps. Two of them, kept
in several checkpoints, give averages of any other length (:mod:`pra.training.posthoc`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pra.config import TrainConfig
from pra.models import Model, build_model, weights
from pra.training.optimizer import gathered, is_sharded

Rule = Callable[[int], float]
"""The part of an average that stays when the weights after step ``step`` (from 0) are taken in."""


def exponential(decay: float) -> Rule:
    """Return the rule of a constant decay; early on ``(1 + step) / (10 + step)``, so that the initial weights fade."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def power(length: float) -> Rule:
    """Return the rule of a power-function average: ``(1 - 1/t)^(gamma + 1)`` after ``t`` steps (equation 2). The
    initial weights have no part in it."""
    exponent = gamma_of(length) + 1.0
    return lambda step: (1.0 - 1.0 / (step + 1)) ** exponent


def gamma_of(length: float) -> float:
    """Return the exponent gamma of the profile of a relative length sigma (algorithm 2).

    It is the largest root of ``(gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma^2`` (equation 126).
    """
    inverse = length**-2.0
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def build_averages(model: Model, train: TrainConfig) -> dict[str, EMA]:
    """Return the averages that a run keeps, by name, ``ema`` first. All begin with the weights of ``model``."""
    rules = {weights.EMA: exponential(train.optimizer.ema_decay)}
    rules |= {weights.power_name(length): power(length) for length in train.averages}
    return {name: EMA(model, rule) for name, rule in rules.items()}


class EMA:
    """A moving average of a model's weights, itself a model (``.model``) that can be sampled: one more copy of them."""

    def __init__(self, model: Model, rule: Rule) -> None:
        self.rule = rule
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """Take in the weights after step ``step`` (from 0)."""
        torch._foreach_lerp_(_local(self.model), _local(model), 1.0 - self.rule(step))

    def whole(self) -> Model:
        """Return the average as a model to sample from, gathered if it is sharded. All call this together."""
        return self.assembled(self.parts(here=True))

    def parts(self, here: bool) -> dict[str, Tensor]:
        """Return what :meth:`assembled` needs, in the processes where ``here`` is true. All call this together.

        It is empty if the average is not sharded.
        """
        return gathered(self.model, here) if any(map(is_sharded, self.model.parameters())) else {}

    def assembled(self, parts: dict[str, Tensor]) -> Model:
        """Return the average as a model to sample from, made of its :meth:`parts`, without communication."""
        if not parts:
            return self.model
        model = build_model(self.model.config, seed=None)
        model.load_state_dict(parts, assign=True)
        model.sampling, model.classes = self.model.sampling, self.model.classes
        model.captions = self.model.captions
        return model.to(self.model.device).eval().requires_grad_(False)


def _local(model: Model) -> list[Tensor]:
    """This process's part of each parameter: the same part in every model that is sharded alike."""
    return [p.to_local() if is_sharded(p) else p for p in model.parameters()]  # type: ignore[attr-defined]
