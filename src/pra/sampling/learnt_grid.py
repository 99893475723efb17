"""Learn a time grid for one model's solver, or the number of steps in each stretch of the raster.

Both minimise the distance between the states that the solver reaches and the states after many small steps. Half of the
sampled problems train the grid, and the other half compares it with other grids. Gradient descent through the solver
moves the times. arXiv 2404.14507 minimises a bound on the error in the same way; here the loss is the error itself.
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
"""Intervals of the midpoint rule whose result counts as exact."""

ROUNDS, TOGETHER, RATE = 150, 512, 0.05
"""Adam steps from each initial grid, problems in a step, and the learning rate."""


@dataclass(frozen=True)
class LearntGrid:
    """A learnt grid of ``times``, and the error of each grid on held-out problems.

    ``errors`` holds the root mean square error of the states, which have norm ``sqrt(d)``, by the grid's name.
    """

    times: tuple[float, ...]
    errors: dict[str, float]


STRETCHES = 8
"""Most stretches of the raster that get their own number of steps."""


@dataclass(frozen=True)
class LearntSteps:
    """Learnt ``raster_steps``, and the cost and error of each schedule on held-out images.

    ``errors`` holds evaluations per patch and the root mean square error of the states, by the schedule's name.
    """

    raster_steps: tuple[int, ...]
    errors: dict[str, tuple[float, float]]


class Problems(NamedTuple):
    """Problems for the head, one patch a row: conditions with and without the class, noise, guidance, exact states."""

    condition: Tensor
    unconditional: Tensor
    start: Tensor
    scale: Tensor
    end: Tensor

    def at(self, rows: Tensor) -> Problems:
        """Return the problems in ``rows``."""
        return Problems(*(column[rows] for column in self))


def learn_grid(
    model: Model,
    config: SamplingConfig,
    images: int = 32,
    progress: Callable[[int], object] = lambda rounds: None,
) -> LearntGrid:
    """Learn a grid of ``config.steps`` intervals for the solver and guidance of ``config``.

    Args:
        model: an autoregressive model.
        config: its own time grid is ignored.
        images: number of sampled images that give the problems. The classes take turns; image ``i`` has seed ``i``.
        progress: called with the number of rounds since the last call, ``2 * ROUNDS`` in total.

    Raises:
        PraError: the solver takes equal steps or adds noise, there are fewer than 2 steps, or the model has no head.
    """
    model = _with_head(model)
    solver = config.solver.value
    if config.solver in (Solver.SHORTCUT, Solver.EULER_MARUYAMA):
        problem = f"solver {solver}: it takes equal steps or adds noise, so no grid can be learnt. Use another solver"
        raise PraError(problem, code="unsupported", name="solver", value=solver)
    if config.steps < 2:
        problem = f"steps {config.steps}: a single interval leaves nothing to learn. Use at least 2"
        raise PraError(problem, name="steps", value=config.steps)
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
    """Learn the number of steps in each stretch of the raster, for the solver, guidance and time grid of ``config``.

    Measures the error of each number of steps in each stretch. Returns the schedule with the smallest sum of squared
    errors that takes at most ``budget`` evaluations per patch on average.

    Args:
        model: an autoregressive model; the solver "shortcut" needs its second head.
        config: its own numbers of steps are ignored.
        budget: evaluations per patch, at least those of one step. Guidance's unconditional half does not count.
        images: number of sampled images, at least 2, as in :func:`learn_grid`. Every second image is held out.

    Raises:
        PraError: the solver adds noise, the model has no head, ``budget`` is below one step, or ``images`` below 2.
    """
    model = _with_head(model)
    solver, each, patches = config.solver.value, solvers.EVALUATIONS[config.solver], model.config.num_groups
    if config.adds_noise:
        problem = f"solver {solver}: it adds noise, so its steps have no error to compare. Use another solver"
        raise PraError(problem, code="unsupported", name="solver", value=solver)
    if not each <= budget < math.inf:
        problem = f"budget {budget:g}: one step of {solver} takes {each} evaluations. Use at least {each}"
        raise PraError(problem, name="budget", value=f"{budget:g}")
    if images < 2:
        raise PraError(f"images {images}: half of them are held out. Use at least 2", name="images", value=images)
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
        problem = f"{kind}: it has no head that writes patch by patch. Use an autoregressive model"
        raise PraError(problem, code="unsupported", name=kind)
    return model


def _stretches(patches: int) -> list[range]:
    count = min(STRETCHES, patches)
    ends = [-(-patches * number // count) for number in range(count + 1)]  # the cuts of SamplingConfig.steps_at
    return [range(first, end) for first, end in pairwise(ends)]


def _errors_along(model: PRA, config: SamplingConfig, problems: Problems, images: int) -> Tensor:
    """Return the mean squared errors of the states, by stretch and image: ``(stretches, images)``."""
    ends = _solved(model, config, problems, solvers.grid_of(config).to(model.device))
    by_position = (ends - problems.end).square().mean(-1).view(-1, images)  # rows are in raster order
    return torch.stack([by_position[where.start : where.stop].mean(0) for where in _stretches(len(by_position))])


def _cheapest(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], counts: Sequence[int], limit: float
) -> list[int]:
    """Return an index into ``counts`` for each stretch: the smallest total error with at most ``limit`` steps in total.

    ``errors[place][i]`` is the mean error of stretch ``i``, which has ``sizes[i]`` patches. This is a knapsack problem,
    solved by dynamic programming over the steps spent so far.
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
    """Sample images with a fine solver, and return the problem of each patch, position by position."""
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
        rows = torch.arange(first, first + TOGETHER, device=start.device) % len(problems.start)  # rows come shuffled
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
    """Return the states ``(rows, d)`` that the solver of ``config`` reaches on the grid ``times``."""
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
