"""Samplers that stay, for who samples again and again with settings that come back."""

from __future__ import annotations

from pra.config import Precision, SamplingConfig
from pra.models import Model
from pra.sampling.sampler import Sampler

MOST_KEPT = 2
"""Samplers of one model: each that has sampled holds an engine, caches and captured graphs."""


class Samplers:
    """The samplers of a model that were asked for last, so that their engines are not made anew.

    Threads may share it, as they may share a :class:`Sampler`: what is under way has an engine of its own.

    Args:
        model: whose samplers they are.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._kept: dict[tuple[SamplingConfig, Precision], Sampler] = {}

    def of(self, config: SamplingConfig, precision: Precision = Precision.AUTO) -> Sampler:
        """The sampler with these settings.

        Raises:
            PraError: as :class:`Sampler`.
        """
        key = config, precision
        sampler = self._kept.get(key) or Sampler(self.model, config, precision)
        # The last is the latest. Each step is whole for other threads; of two that make the same sampler one stays.
        self._kept.pop(key, None)
        for older in list(self._kept)[: 1 - MOST_KEPT]:
            self._kept.pop(older, None)
        self._kept[key] = sampler
        return sampler
