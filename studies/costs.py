"""The cost of a study's system beside PRA's, by counting (:mod:`pra.evaluation.flops`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pra.config import (
    AnyModelConfig,
    Clean,
    DataConfig,
    Noised,
    ObjectiveConfig,
    Parallel,
    Rollout,
    RunConfig,
    SamplingConfig,
    Solver,
    TrainConfig,
)
from pra.evaluation.flops import sampling_flops, training_flops
from studies.catalogue import STUDIES
from studies.groups import Group
from studies.measures import whole_image_evaluations
from studies.settings import SCALES, SETTINGS, Scale, Setting, base


@dataclass(frozen=True)
class Relative:
    """FLOPs of one image, in training and in sampling, over those of PRA in the same setting with guidance."""

    training: float
    sampling: float


def relative(study: str, group: Group) -> Relative | None:
    """Return the costs of a group at its best guidance; None where the catalogue has no such cell (any more)."""
    row = group.rows[0]
    setting, scale = SETTINGS.get(row.get("setting", "")), SCALES.get(row.get("scale", ""))
    if study not in STUDIES or setting is None or scale is None:
        return None
    pra, run = base(setting, scale), _runs(study, setting, scale).get((group.system, group.value))
    if run is None:
        return None
    # FLOPs depend on whether guidance is on, not on its scale.
    guidance = 1.0 if group.guidance == 1 else pra.sampling.guidance
    own = _sampling(run.model, replace(run.sampling, guidance=guidance))
    return Relative(_training(run) / _training(pra), own / _sampling(pra.model, pra.sampling))


@functools.cache
def _runs(study: str, setting: Setting, scale: Scale) -> dict[tuple[str, float | str], RunConfig]:
    return {(cell.system, cell.value): cell.config for cell in STUDIES[study].cells(setting, scale)}


def _training(run: RunConfig) -> int:
    rollout = run.train.rollout
    # Nor does the strength of a perturbation: one count serves a whole search.
    if isinstance(rollout, Parallel | Noised):
        rollout = Parallel() if isinstance(rollout, Parallel) else Noised(sigma=1.0)
    return _count_training(run.model, run.train.objective, rollout)


@functools.cache
def _count_training(model: AnyModelConfig, objective: ObjectiveConfig, rollout: Rollout) -> int:
    return training_flops(_run(model, objective, rollout))


@functools.cache
def _sampling(model: AnyModelConfig, sampling: SamplingConfig) -> int:
    if not model.autoregressive:
        # Every evaluation is the whole model once more: one is counted.
        once = replace(sampling, solver=Solver.EULER, steps=1)
        return whole_image_evaluations(sampling) * sum(sampling_flops(_run(model, sampling=once)).values())
    return sum(sampling_flops(_run(model, sampling=sampling)).values())


def _run(
    model: AnyModelConfig,
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008  frozen
    rollout: Rollout = Clean(),  # noqa: B008
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
) -> RunConfig:
    """The fields of a run that affect its cost."""
    train = TrainConfig(steps=1, batch_size=1, objective=objective, rollout=rollout)
    return RunConfig(recipe="", model=model, data=DataConfig(source=""), train=train, sampling=sampling)
