"""The studies: their runs and measurements."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pra.config import (
    SHORTCUT_STEPS,
    Clean,
    Noised,
    Parallel,
    Reconstructed,
    RunConfig,
    Solver,
    TimeGrid,
    apply_settings,
)
from pra.errors import PraError, nearest
from pra.recipes import distill
from pra.recipes.systems import SYSTEMS
from pra.recipes.tricks import grouped, plus
from pra.sampling import solvers
from studies.ladder import Change, climb, in_equal_seconds
from studies.measures import Gap, HeldOut, Measure, Probe, Quality, Reconstruction, sweep
from studies.settings import LONGER, Scale, Setting, base

PRA = "pra"
LONG_ROLLOUT = 16
"""Tokens beyond which exact rollout training is left out: its step costs as many passes."""


@dataclass(frozen=True)
class Cell:
    """One system of a study, still without a seed.

    ``value`` is the setting that the study varies, if any; ``base`` is the run whose weights it starts from.
    """

    system: str
    config: RunConfig
    measures: tuple[Measure, ...]
    value: float | str = ""
    base: RunConfig | None = None


@dataclass(frozen=True)
class Study:
    """A question, its default settings, and its cells in one setting.

    A brief scale runs the first ``least`` settings.
    """

    name: str
    question: str
    settings: tuple[str, ...]
    cells: Callable[[Setting, Scale], Iterator[Cell]]
    least: int = 1

    def asked_in(self, scale: Scale) -> tuple[str, ...]:
        """The settings at a scale, unless others are named."""
        return self.settings[: self.least] if scale.brief else self.settings


def _system(name: str, setting: Setting, scale: Scale, recipe: Change = lambda run: run) -> RunConfig:
    run = recipe(base(setting, scale))
    if name == PRA:
        return run
    system = replace(SYSTEMS[name](run), recipe=run.recipe)
    if isinstance(system.train.rollout, Noised):
        return replace(system, train=replace(system.train, rollout=Noised(sigma=setting.input_noise)))
    if name == "jit":
        # 15 evaluations of the whole model, which cost more than the 10 of the others' heads per token.
        return replace(system, sampling=replace(run.sampling, solver=Solver.HEUN, steps=8))
    return system


def _measures(setting: Setting, scale: Scale, run: RunConfig) -> tuple[Measure, ...]:
    codec = [Reconstruction(scale.samples)] if run.model.codec else []
    return (*sweep(setting, scale, run.sampling), *codec)


def _systems(setting: Setting, scale: Scale, recipe: Change = lambda run: run) -> Iterator[Cell]:
    names = [PRA, *SYSTEMS]
    if setting.tokens > LONG_ROLLOUT:
        names.remove("exact")
    for name in names:
        run = _system(name, setting, scale, recipe)
        yield Cell(name, run, _measures(setting, scale, run))


def _token_dimension(setting: Setting, scale: Scale) -> Iterator[Cell]:
    for name in ("teacher-forced", "x-prediction", PRA, "jit"):
        run = _system(name, setting, scale)
        yield Cell(name, run, _measures(setting, scale, run), value=run.model.patch_dim)


def _noise(setting: Setting, scale: Scale) -> Iterator[Cell]:
    """The same search for all systems that perturb their inputs: six strengths each, including zero."""
    run = base(setting, scale)
    for low in (0.0, 0.6, 0.8, 0.9, 0.95, 1.0):
        perturbed = replace(run, train=replace(run.train, rollout=Parallel(t_min=low) if low < 1 else Reconstructed()))
        yield Cell(PRA, perturbed, _measures(setting, scale, perturbed), value=low)
    for name, without in (("input-noise", "teacher-forced"), ("input-noise-x", "x-prediction")):
        clean = _system(without, setting, scale)
        for sigma in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8):
            noised = replace(clean, train=replace(clean.train, rollout=Noised(sigma=sigma) if sigma else Clean()))
            yield Cell(name, noised, _measures(setting, scale, noised), value=sigma)


def _length(setting: Setting, scale: Scale) -> Iterator[Cell]:
    """The ladder from pixels to PRA, trained as long as in the other studies and ``LONGER`` times as long."""
    for factor in (1, LONGER):
        longer = replace(scale, steps=scale.steps * factor)
        for name in (PRA, "reconstructed", "states", "input-noise-x", "x-prediction"):
            run = _system(name, setting, longer)
            yield Cell(name, run, _measures(setting, scale, run), value=run.train.steps)


def _ablation(setting: Setting, scale: Scale) -> Iterator[Cell]:
    """Each variant is PRA with one setting changed, as ``--set`` changes it."""
    run = base(setting, scale)
    sees = "model.codec.encoder.sees_condition=true"
    dims = [dim for dim in (setting.state_dim // 2, 2 * setting.state_dim) if dim >= 3]
    variants = {
        "PRA": [],
        **{f"d = {dim}": [f"model.codec.state_dim={dim}"] for dim in dims},
        "t_min = 0": ["train.rollout.t_min=0"],
        "t_min = 0.6": ["train.rollout.t_min=0.6"],
        "not perturbed": ["train.rollout=Reconstructed"],
        "clean inputs": ["train.rollout=Clean"],
        "encoder sees h": [sees],
        "encoder sees h, masked by half": [sees, "train.objective.encoder_masking=0.5"],
        "encoder sees h and half of the patches": [
            sees,
            "train.objective.encoder_masking=0.5",
            "train.objective.encoder_masks=patch",
        ],
        "L_rec also on D(z~)": ["train.objective.perturbed_weight=0.5"],
        "L_rec on D(z~) alone": ["train.objective.perturbed_weight=1", "train.objective.pixel_weight=0"],
        "L_aux of weight 1": ["train.objective.auxiliary_weight=1"],
        "L1 for L_rec": ["train.objective.pixel_loss=l1"],
        "decoder without context": ["model.codec.context=false"],
        "codec warmed up": [f"train.codec_warmup={run.train.steps // 4}"],
        "no L_aux": ["train.objective.auxiliary_weight=0"],
    }
    for name, changes in variants.items():
        changed = apply_settings(run, changes)
        yield Cell(PRA, changed, _measures(setting, scale, changed), value=name)
    yield Cell(
        PRA, run, tuple(sweep(setting, scale, replace(run.sampling, renormalise=False))), value="not renormalised"
    )


REAL = "held-out images"
"""Real images, in place of a system."""


def _recipe(setting: Setting, scale: Scale) -> Iterator[Cell]:
    faithful = base(setting, scale)
    rungs = list(climb(faithful))
    for name, run in [*rungs, *in_equal_seconds(setting.name, rungs)]:
        # A rung of the sampler alone measures the weights of the rung before.
        yield Cell(PRA, replace(run, sampling=faithful.sampling), _measures(setting, scale, run), value=name)
    yield Cell(REAL, faithful, (HeldOut(),), value=REAL)


def _rollout_gap(setting: Setting, scale: Scale) -> Iterator[Cell]:
    for cell in _systems(setting, scale):
        if cell.system != "jit":
            yield replace(cell, measures=(Gap(cell.config.sampling, scale.samples // 2),))


def _probe(setting: Setting, scale: Scale) -> Iterator[Cell]:
    """Probe how much systems learn about the classes, beside raw pixels and initial weights."""
    images = 2 * scale.samples
    for name in (PRA, *(name for name in SYSTEMS if name != "exact")):
        times = (0.5, 0.75, 1.0) if name == "jit" else (None,)
        yield Cell(name, _system(name, setting, scale), tuple(Probe("trained", images, time) for time in times))
    for name in (PRA, "teacher-forced"):
        yield Cell("random", _system(name, setting, scale), (Probe("random", images),), value=name)
    yield Cell("pixels", _system(PRA, setting, scale), (Probe("pixels", images),))


def _solver(setting: Setting, scale: Scale) -> Iterator[Cell]:
    """Every solver on the uniform grid, those of second order on the others too; and a second head, of shortcuts."""
    run = base(setting, scale)

    def swept(system: RunConfig, solver: Solver, budgets: tuple[int, ...], grid: TimeGrid) -> tuple[Quality, ...]:
        how = replace(system.sampling, solver=solver, time_grid=grid)
        steps = (budget // solvers.EVALUATIONS[solver] for budget in budgets)
        return tuple(Quality(replace(how, steps=count), scale.samples) for count in steps)

    ordinary: list[Solver] = [solver for solver in Solver if solver is not Solver.SHORTCUT]
    for solver in ordinary:
        yield Cell(PRA, run, swept(run, solver, (2, 4, 6, 10, 20), TimeGrid.UNIFORM), value=solver.value)
    for grid in (TimeGrid.COSINE, TimeGrid.LOGIT_NORMAL):
        for solver in (Solver.MIDPOINT, Solver.ADAMS_BASHFORTH, Solver.DPM):
            yield Cell(PRA, run, swept(run, solver, (4, 6, 10), grid), value=f"{solver.value}, {grid.value}")
    for solver in (Solver.MIDPOINT, Solver.ADAMS_BASHFORTH, Solver.DPM):
        measures = swept(run, solver, (4, 6, 10), TimeGrid.UNIFORM)
        learnt = tuple(replace(measure, learnt_grid=True) for measure in measures)
        yield Cell(PRA, run, learnt, value=f"{solver.value}, learnt")
    short = distill.second_head(run, "base", distill.STEPS)
    steps = swept(run, Solver.SHORTCUT, SHORTCUT_STEPS, TimeGrid.UNIFORM)
    yield Cell("pra, distilled", short, steps, Solver.SHORTCUT.value, base=run)


DEFAULT = "default"
"""The setting of the study `pareto` that the others are compared with."""
TOLD = 4 / 3
"""Largest guidance scale that a second head is told, over the one it is sampled with."""


def _pareto(setting: Setting, scale: Scale) -> Iterator[Cell]:
    """Yield the sampler's default, each way to make images faster, and ways together, all at one guidance scale."""
    run = plus(base(setting, scale))

    def cell(value: str, config: RunConfig, start: RunConfig | None = None, **changes: Any) -> Cell:
        how = replace(run.sampling, guidance=setting.guidance, **changes)
        return Cell(PRA, config, (Quality(how, scale.samples),), value, start)

    def one_stream(value: str, start: RunConfig, *steps: int) -> Cell:
        told = distill.second_head(start, "base", distill.STEPS, TOLD * setting.guidance)
        along = steps if steps[1:] else None
        return cell(value, told, start, solver=Solver.SHORTCUT, steps=steps[0], raster_steps=along)

    yield cell(DEFAULT, run)
    yield cell("Adams-Bashforth, 3 steps", run, solver=Solver.ADAMS_BASHFORTH, steps=3)
    yield cell("Adams-Bashforth, 2 steps", run, solver=Solver.ADAMS_BASHFORTH, steps=2)
    yield cell("DPM, 3 steps", run, solver=Solver.DPM, steps=3)
    yield cell("5, 3, 2 steps along the raster", run, raster_steps=(5, 3, 2))
    short = distill.second_head(run, "base", distill.STEPS)
    yield cell("distilled, 1 step", short, run, solver=Solver.SHORTCUT, steps=1)
    yield one_stream("distilled guidance, 4 steps", run, 4)
    yield one_stream("distilled guidance, 2, 1, 1 steps", run, 2, 1, 1)
    yield one_stream("distilled guidance, 1 step", run, 1)
    for name, group in (("groups-2", (1, 2)), ("groups-4", (2, 2))):
        start = grouped(run, group)
        yield cell(name, start)
        yield one_stream(f"{name}, distilled guidance, 1 step", start, 1)


STUDIES = {
    study.name: study
    for study in (
        Study(
            "systems",
            "Which way of making inputs and outputs gives the best images, at equal parameters, steps and data order?",
            ("fashion-64", "emoji-64", "emoji-16", "fashion-16"),
            _systems,
        ),
        Study(
            "systems-plus",
            "Does the order of the systems last under the recipe `plus`?",
            ("emoji-64", "fashion-64"),
            functools.partial(_systems, recipe=plus),
        ),
        Study(
            "token-dimension",
            "How do autoregressive models and diffusion fare as a token grows from 48 to 768 numbers?",
            ("emoji-16-small", "emoji-16"),
            _token_dimension,
            least=2,
        ),
        Study(
            "noise",
            "How strongly should inputs be perturbed: states before they are decoded, or pixels?",
            ("fashion-64", "emoji-64", "emoji-16", "fashion-16"),
            _noise,
        ),
        Study(
            "length",
            "Does the order of the systems last when they train longer?",
            ("fashion-64", "emoji-64"),
            _length,
        ),
        Study("ablation", "What does each part of PRA contribute?", ("fashion-64",), _ablation),
        Study(
            "recipe",
            "Which changes to faithful PRA make its images better at equal steps?",
            ("emoji-64", "fashion-64", "emoji-16"),
            _recipe,
        ),
        Study(
            "rollout-gap",
            "How far does sampling lead each system from what it was trained on?",
            ("fashion-64", "emoji-64"),
            _rollout_gap,
        ),
        Study(
            "probe",
            "How well does a linear classifier read the class from each layer of the frozen models?",
            ("fashion-64", "emoji-64"),
            _probe,
        ),
        Study("solver", "What does the number of head evaluations buy?", ("fashion-64",), _solver),
        Study("pareto", "How fast can an image be made at what cost in FID?", ("emoji-64", "fashion-64"), _pareto),
    )
}


def find_study(name: str) -> Study:
    """A study by its name.

    Raises:
        PraError: the name is unknown; the error names the nearest.
    """
    if name not in STUDIES:
        raise PraError(f"no study {name!r}{nearest(name, STUDIES)}")
    return STUDIES[name]


def only(study: Study, column: str, wanted: Sequence[str], setting: Setting, scale: Scale) -> Study:
    """A study of the cells whose ``column`` (``system`` or ``value``) is among the ``wanted``.

    Figures of other cells stay in its table.

    Raises:
        PraError: no cell has that in that setting at that scale; the nearest is given.
    """
    known = list(dict.fromkeys(shown(getattr(cell, column)) for cell in study.cells(setting, scale)))
    for name in wanted:
        if name not in known:
            raise PraError(f"the study {study.name} has no {column} {name!r}{nearest(name, known)}")

    def cells(setting: Setting, scale: Scale) -> Iterator[Cell]:
        return (cell for cell in study.cells(setting, scale) if shown(getattr(cell, column)) in wanted)

    return replace(study, cells=cells)


def shown(value: float | str) -> str:
    """Return a value as tables show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
