"""The ladder of the study `recipe`: from faithful PRA to the recipe, a change at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pra.config import RunConfig, apply_settings
from pra.recipes import tricks

FAITHFUL = "faithful"
PLUS = "plus"
EQUAL_SECONDS = ", equal seconds"
"""Added to the name of a kept rung that was trained for the seconds of faithful PRA, in fewer steps."""

COST = Path(__file__).parent / "recipe" / "cost.json"
"""Seconds of a step over faithful PRA's, by setting and rung (``benchmarks/recipe_cost.py``)."""

Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class Rung:
    """A change that is tried on all ``kept`` rungs before it."""

    name: str
    change: Change
    kept: bool = False


def _set(*settings: str) -> Change:
    return lambda run: apply_settings(run, list(settings))


LADDER = (
    Rung("Muon", tricks.muon, kept=True),
    Rung("L_rec also on D(z~)", tricks.perturbed, kept=True),
    Rung("8 noise draws", _set("train.objective.noise_draws=8")),
    Rung("guidance from t = 0.3 on", _set("sampling.guidance_interval=[0.3,1]")),
    Rung("deblocking filter", tricks.deblocked, kept=True),
    Rung("linear decay", _set("train.optimizer.schedule=linear")),
    Rung("uniform flow times", _set("train.objective.logit_normal_times=false")),
    Rung(
        "encoder sees h, masked by half",
        _set("model.codec.encoder.sees_condition=true", "train.objective.encoder_masking=0.5"),
    ),
    Rung("deeper head, shallower backbone", _set("model.head.depth=4", "model.backbone.depth=3")),
    Rung("shallower head, deeper backbone", _set("model.head.depth=1", "model.backbone.depth=5")),
    Rung("L_aux of weight 1", _set("train.objective.auxiliary_weight=1")),
)


def climb(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield faithful PRA, each rung by name, and the whole recipe."""
    yield FAITHFUL, run
    for rung in LADDER:
        changed = rung.change(run)
        yield rung.name, changed
        if rung.kept:
            run = changed
    yield PLUS, run


def in_equal_seconds(setting: str, rungs: Iterable[tuple[str, RunConfig]]) -> Iterator[tuple[str, RunConfig]]:
    """Yield the rungs whose step was timed in this setting, each with as many steps as take faithful PRA's seconds."""
    ratios = json.loads(COST.read_text())["settings"].get(setting, {}) if COST.exists() else {}
    for name, run in rungs:
        if name in ratios:
            steps = round(run.train.steps / ratios[name]["median"])
            yield name + EQUAL_SECONDS, replace(run, train=replace(run.train, steps=steps))
