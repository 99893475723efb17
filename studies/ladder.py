"""The ladder of the study `recipe`: from faithful PRA to the recipe, a change at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pra.config import RunConfig, apply_settings

FAITHFUL = "faithful"
PLUS = "plus"


@dataclass(frozen=True)
class Rung:
    """A change that is tried on all ``kept`` rungs before it; ``settings`` as ``--set`` takes them."""

    name: str
    settings: tuple[str, ...]
    kept: bool = False


LADDER = (
    Rung("Muon", ("train.optimizer.matrices=Muon", "train.optimizer.matrices.lr=0.01"), kept=True),
    Rung("L_rec also on D(z~)", ("train.objective.perturbed_weight=0.5",), kept=True),
    Rung("8 noise draws", ("train.objective.noise_draws=8",)),
    Rung("guidance from t = 0.3 on", ("sampling.guidance_interval=[0.3,1]",)),
)


def climb(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield faithful PRA, each rung by name, and the whole recipe."""
    yield FAITHFUL, run
    kept: list[str] = []
    for rung in LADDER:
        yield rung.name, apply_settings(run, [*kept, *rung.settings])
        if rung.kept:
            kept += rung.settings
    yield PLUS, apply_settings(run, kept)
