"""Distillation: a second head learns to sample from a trained model in few steps. All other weights are frozen.

The second head starts as a copy of the first and learns from it (:func:`pra.method.objectives.shortcut_loss`). Training
both heads together from scratch (``model.head.shortcut=true`` alone) works less well; see docs/performance.md.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pra.config import LearningRate, RunConfig, Solver
from pra.errors import PraError
from pra.models import weights
from pra.training.run import read_run

NAME = "distilled"

STEPS, WARM_UP, DRAWS = 2000, 50, 4

EVALUATIONS = 4
"""Default sampling steps of the distilled model."""

EMA_DECAY = 0.99
"""Decay of a short moving average: the second head starts near its goal."""


def run_folder(start: str) -> Path:
    """Return ``runs/fashion-distilled`` beside ``runs/fashion``, or beside the run of a checkpoint."""
    run = _run_of(start)
    return run.with_name(f"{run.name}-{NAME}")


def _run_of(start: str) -> Path:
    folder = weights.run_of(weights.model_folder(start))
    if folder is None:
        problem = f"{start} is not a run: a second head learns from the run's data. Give a run folder"
        raise PraError(problem, code="mismatch", path=start)
    named = Path(start).expanduser()
    run = named if (named / weights.CONFIG).exists() and not (named / weights.MODEL).exists() else named.parent.parent
    return run if run.name not in ("", "..") else Path(os.path.abspath(run))


def configure(
    start: str, steps: int | None = None, average: str = weights.EMA, guidance: float | None = None
) -> RunConfig:
    """Return the configuration that trains a second head for a run.

    Args:
        start: a run folder or one of its checkpoints.
        steps: of the training; :data:`STEPS` by default.
        average: the weights to start from (:func:`pra.load`).
        guidance: a number above 1. The second head then reads the guidance scale, up to this number, and learns guided
            steps.

    Raises:
        PraError: ``start`` is not a run, or its model is not autoregressive or has a second head already.
    """
    run = read_run(_run_of(start))
    if not run.model.autoregressive:
        raise PraError(f"{start} is a {run.model.name}, which has no head to distill", code="unsupported", path=start)
    if run.model.has_shortcut:
        problem = f"{start} has a second head already. Sample it with --solver shortcut --steps 1, 2, 4 or 8"
        raise PraError(problem, code="exists", path=start)
    config = second_head(run, str(Path(start).expanduser()), STEPS if steps is None else steps, guidance)
    return replace(config, initial_average=average)


def second_head(run: RunConfig, start: str, steps: int, guidance: float | None = None) -> RunConfig:
    """Return the configuration that trains a second head for ``run``, which lies in the folder ``start``."""
    assert run.model.autoregressive, "only a model with a head is distilled"
    sampling = replace(run.sampling.with_steps(EVALUATIONS), solver=Solver.SHORTCUT, times=None, raster_steps=None)
    if guidance is not None:
        scale = min(max(sampling.guidance, 1.0), guidance)
        sampling = replace(sampling, guidance=scale, guidance_interval=(0.0, 1.0))
    return replace(
        run,
        recipe=f"{run.recipe}, {NAME}",
        model=replace(run.model, head=replace(run.model.head, shortcut=True, shortcut_guidance=guidance)),
        train=replace(
            run.train,
            steps=steps,
            codec_warmup=0,
            trainable=("shortcut",),
            objective=replace(run.train.objective, noise_draws=1, shortcut_draws=DRAWS),
            optimizer=replace(
                run.train.optimizer,
                schedule=LearningRate.COSINE,
                warmup_steps=WARM_UP,
                ema_decay=EMA_DECAY,
                weight_decay=0.0,
                matrices=None,
            ),
        ),
        sampling=sampling,
        targets=None,
        initial=start,
    )
