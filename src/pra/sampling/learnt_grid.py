"""The best places of a solver's intervals for one model: the grid that ends nearest to where many small steps end; and
how many of them each stretch of the raster needs.

Gradient descent through the solver moves the times (as arXiv 2404.14507, with the error of the solution in place of a
bound on it), on one half of the problems of real sampling; the other half compares the grid with others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.config import SHORTCUT_STEPS, Precision, SamplingConfig, Solver, TimeGrid
from pra.errors import PraError
from pra.method import noise
from pra.method.noise import Purpose
from pra.models import PRA, Model
from pra.sampling import solvers
from pra.sampling.algorithm import generate
from pra.sampling.guidance import scale_at
from pra.sampling.runner import Engine

FINE = 32
"""Intervals of the midpoint rule whose end counts as exact."""

ROUNDS, TOGETHER, RATE = 150, 512, 0.05
"""Steps of Adam from each start, problems in each, and its rate."""


@dataclass(frozen=True)
class LearntGrid:
    """``times``, and the root mean square error of the states (of norm ``sqrt(d)``) by grid, on problems kept back."""

    times: tuple[float, ...]
    errors: dict[str, float]


STRETCHES = 8
"""Stretches of the raster, at most, that get a number of steps each."""


@dataclass(frozen=True)
class LearntSteps:
    """``raster_steps``, and by schedule its evaluations a patch and the root mean square error of the states, on images
    kept back."""

    raster_steps: tuple[int, ...]
    errors: dict[str, tuple[float, float]]


class Problems(NamedTuple):
    """Rows of conditions, of those of the null class, starts, guidance scales and ends."""

    condition: Tensor
    unconditional: Tensor
    start: Tensor
    scale: Tensor
    end: Tensor

    def at(self, rows: Tensor) -> Problems:
        """Return some of the problems."""
        return Problems(*(column[rows] for column in self))


def learn_grid(
    model: Model,
    config: SamplingConfig,
    images: int = 32,
    progress: Callable[[int], object] = lambda rounds: None,
) -> LearntGrid:
    """Learn a grid of ``config.steps`` intervals for ``config.solver`` and its guidance.

    Args:
        model: its head is solved.
        config: its own grid is ignored.
        images: sampled for the conditions, their classes in turn; image ``i`` has seed ``i``.
        progress: called with the rounds done since the last call, ``2 * ROUNDS`` in all.

    Raises:
        PraError: a solver that leaves nothing to learn, or a model that has no head.
    """
    model = _with_head(model)
    solver = config.solver.value
    if config.solver in (Solver.SHORTCUT, Solver.EULER_MARUYAMA):
        problem = f"there is no grid to learn for the solver {solver}, which takes equal steps or adds noise of its own"
        raise PraError(problem, code="unsupported", name="solver", value=solver)
    if config.steps < 2:
        raise PraError(f"steps {config.steps} leave no grid to learn. Use at least 2", name="steps", value=config.steps)
    config = replace(config, times=None, time_grid=TimeGrid.UNIFORM, shift=1.0, raster_steps=None)
    problems = sampled_problems(model, config, images)
    order = torch.argsort(noise.uniform(noise.keys(0, torch.zeros(1, dtype=torch.int64)), len(problems.start))[0])
    order = order.to(problems.start.device)
    known, kept_back = problems.at(order[::2]), problems.at(order[1::2])
    loss = functools.partial(_loss, model, config)
    starts = [solvers.time_grid(kind, config.steps) for kind in (TimeGrid.UNIFORM, TimeGrid.COSINE)]
    learnt = [_descend(loss, known, start.to(order.device), progress) for start in starts]
    with torch.no_grad():
        best = min(learnt, key=lambda times: float(loss(known, times)))
        grids = {kind.value: solvers.time_grid(kind, config.steps) for kind in TimeGrid} | {"learnt": best}
        errors = {name: loss(kept_back, times.to(order.device)).sqrt().item() for name, times in grids.items()}
    return LearntGrid(tuple(best.tolist()), errors)


def learn_steps(model: Model, config: SamplingConfig, budget: float, images: int = 32) -> LearntSteps:
    """Learn how many steps each stretch of the raster needs, for ``config.solver``, its guidance and its time grid.

    Measures the error of every number of steps in every stretch, and returns the schedule with the least sum of squared
    errors among those that take at most ``budget`` evaluations a patch on average.

    Args:
        model: its head is solved, or its second head where the solver is shortcut.
        config: its own numbers of steps are ignored.
        budget: evaluations, at least those of one step; the second stream of guidance does not count.
        images: sampled as in :func:`learn_grid`; every other one is kept back.

    Raises:
        PraError: a solver that adds noise, a model that has no head, a budget below one step, or a single image.
    """
    model = _with_head(model)
    solver, each, patches = config.solver.value, solvers.EVALUATIONS[config.solver], model.config.num_groups
    if config.adds_noise:
        problem = f"the solver {solver} adds noise of its own: its steps have no error to compare. Use another"
        raise PraError(problem, code="unsupported", name="solver", value=solver)
    if not each <= budget < math.inf:
        problem = f"budget {budget:g} does not buy a step of {solver}, which takes {each}. Use at least {each}"
        raise PraError(problem, name="budget", value=f"{budget:g}")
    if images < 2:
        raise PraError(f"images {images}: every other one is kept back. Use at least 2", name="images", value=images)
    config = replace(config, times=None, raster_steps=None)
    most = min(FINE, math.ceil(4 * budget / each))
    counts = [n for n in range(1, most + 1) if config.solver is not Solver.SHORTCUT or n in SHORTCUT_STEPS]
    problems = sampled_problems(model, config, images)
    with torch.no_grad():
        errors = torch.stack([_errors_along(model, config.with_steps(n), problems, images) for n in counts])
    known, kept_back = errors[..., ::2].mean(-1).double(), errors[..., 1::2].mean(-1).double()
    sizes = [len(stretch) for stretch in _stretches(patches)]
    chosen = _cheapest(known.tolist(), sizes, counts, budget * patches / each)
    near = [place for place, n in enumerate(counts) if n * each <= 2 * budget]
    schedules = {"learnt": chosen} | {f"{counts[place]} everywhere": [place] * len(sizes) for place in near}
    found = {}
    for name, places in schedules.items():
        spent = sum(counts[place] * size for place, size in zip(places, sizes, strict=True)) * each / patches
        error = sum(
            kept_back[place, i].item() * size for i, (place, size) in enumerate(zip(places, sizes, strict=True))
        )
        found[name] = spent, math.sqrt(error / patches)
    return LearntSteps(tuple(counts[place] for place in chosen), found)


def _with_head(model: Model) -> PRA:
    if not model.config.autoregressive:
        kind = model.config.name
        problem = f"a grid is learnt for a head that writes patch by patch; a {kind} has none"
        raise PraError(problem, code="unsupported", name=kind)
    return model


def _stretches(patches: int) -> list[range]:
    count = min(STRETCHES, patches)
    ends = [-(-patches * number // count) for number in range(count + 1)]  # as SamplingConfig.steps_at cuts them
    return [range(first, end) for first, end in pairwise(ends)]


def _errors_along(model: PRA, config: SamplingConfig, problems: Problems, images: int) -> Tensor:
    """Return the mean squared errors ``(stretches, images)`` of the states."""
    ends = _solved(model, config, problems, solvers.grid_of(config).to(model.device))
    by_position = (ends - problems.end).square().mean(-1).view(-1, images)  # the rows are in order of the raster
    return torch.stack([by_position[where.start : where.stop].mean(0) for where in _stretches(len(by_position))])


def _cheapest(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], counts: Sequence[int], limit: float
) -> list[int]:
    """Return the place in ``counts`` for each stretch with the least sum of errors, of at most ``limit`` steps in all.

    ``errors[place][i]`` is the mean error of stretch ``i``, of ``sizes[i]`` patches. Knapsack, by steps spent so far.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for i, size in enumerate(sizes):
        longer: dict[int, tuple[float, list[int]]] = {}
        for spent, (error, chosen) in best.items():
            for place, count in enumerate(counts):
                now, total = spent + count * size, error + errors[place][i] * size
                if now <= limit and total < longer.get(now, (math.inf,))[0]:
                    longer[now] = total, [*chosen, place]
        best = longer
    return min(best.values())[1]


def sampled_problems(model: PRA, config: SamplingConfig, images: int) -> Problems:
    """Return the problems of sampling some images, position by position, with the ends of a fine solver."""
    size = model.config
    device = model.device
    labels = torch.arange(images, device=device) % size.num_classes
    keys = noise.keys(0, torch.arange(images)).to(device)
    shape = size.num_groups, size.group_state_dim
    starts = config.temperature * noise.normal(noise.fold(keys, Purpose.SAMPLE_START), *shape)
    fine = replace(config, solver=Solver.MIDPOINT, steps=FINE, time_grid=TimeGrid.UNIFORM, shift=1.0)
    head = model.head_for(config.solver)
    rows: list[tuple[Tensor, ...]] = []
    engine = Engine(model, fine, images, Precision.FLOAT32)
    with engine.arithmetic():
        for token in generate(engine.steps, labels, starts, starts.new_empty(images, 0, size.group_dim)):
            condition = head.project(token.h.squeeze(1))
            scale = torch.full((images, 1), scale_at(config, token.position, size.num_groups), device=device)
            start = starts[:, token.position]
            rows.append((condition[:images], condition[-images:], start, scale, token.state.squeeze(1).clone()))
    # Clone: tensors made in inference mode cannot take part in a gradient.
    return Problems(*(torch.cat(column).clone() for column in zip(*rows, strict=True)))


def _descend(
    loss: Callable[[Problems, Tensor], Tensor], problems: Problems, start: Tensor, progress: Callable[[int], object]
) -> Tensor:
    logits = start.diff().log().requires_grad_()
    optimizer = torch.optim.Adam([logits], RATE)
    for first in range(0, ROUNDS * TOGETHER, TOGETHER):
        rows = torch.arange(first, first + TOGETHER, device=start.device) % len(problems.start)  # they are shuffled
        (logits.grad,) = torch.autograd.grad(loss(problems.at(rows), _times(logits)), [logits])
        optimizer.step()
        progress(1)
    return _times(logits.detach())


def _times(logits: Tensor) -> Tensor:
    inner = logits.softmax(0).cumsum(0)[:-1]
    return torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])


def _loss(model: PRA, config: SamplingConfig, problems: Problems, times: Tensor) -> Tensor:
    return F.mse_loss(_solved(model, config, problems, times), problems.end)


def _solved(model: PRA, config: SamplingConfig, problems: Problems, times: Tensor) -> Tensor:
    """Return the states ``(rows, d)`` that the solver of the settings ends at, on a grid of ``times``."""
    head, shortcut = model.head_for(config.solver), config.solver is Solver.SHORTCUT
    span = torch.full_like(times[:1], 1.0 / config.steps) if shortcut else None
    low, high = config.guidance_interval
    conditions = torch.cat([problems.condition, problems.unconditional])

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if head.scale_in is not None:
            return head(z, t, problems.condition, span, scale=problems.scale.squeeze(-1))  # type: ignore[no-any-return]
        if not (config.guidance != 1.0 and low <= t.detach() <= high):
            return head(z, t, problems.condition, span)  # type: ignore[no-any-return]
        conditional, unconditional = head(z.repeat(2, 1), t, conditions, span).chunk(2)
        return unconditional + problems.scale * (conditional - unconditional)  # type: ignore[no-any-return]

    z = solvers.INTEGRATORS[config.solver](velocity, problems.start, times.unsqueeze(-1), solvers.no_noise)
    return model.codec.normalise(z) if config.renormalise else z
