"""The best places of a solver's intervals for one model: the grid that ends nearest to where many small steps end.

Gradient descent through the solver moves the times (as arXiv 2404.14507, with the error of the solution in place of a
bound on it), on one half of the problems of real sampling; the other half compares the grid with others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.config import Precision, SamplingConfig, Solver, TimeGrid
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
    solver, kind = config.solver.value, model.config.name
    if not model.config.autoregressive:
        problem = f"a grid is learnt for a head that writes patch by patch; a {kind} has none"
        raise PraError(problem, code="unsupported", name=kind)
    if config.solver in (Solver.SHORTCUT, Solver.EULER_MARUYAMA):
        problem = f"there is no grid to learn for the solver {solver}, which takes equal steps or adds noise of its own"
        raise PraError(problem, code="unsupported", name="solver", value=solver)
    if config.steps < 2:
        raise PraError(f"steps {config.steps} leave no grid to learn. Use at least 2", name="steps", value=config.steps)
    config = replace(config, times=None, time_grid=TimeGrid.UNIFORM, shift=1.0)
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


def sampled_problems(model: PRA, config: SamplingConfig, images: int) -> Problems:
    """Return the problems of sampling some images, with the ends of a fine solver."""
    size = model.config
    device = model.device
    labels = torch.arange(images, device=device) % size.num_classes
    keys = noise.keys(0, torch.arange(images)).to(device)
    shape = size.num_groups, size.group_state_dim
    starts = config.temperature * noise.normal(noise.fold(keys, Purpose.SAMPLE_START), *shape)
    fine = replace(config, solver=Solver.MIDPOINT, steps=FINE)
    rows: list[tuple[Tensor, ...]] = []
    engine = Engine(model, fine, images, Precision.FLOAT32)
    with engine.arithmetic():
        for token in generate(engine.steps, labels, starts, starts.new_empty(images, 0, size.group_dim)):
            condition = model.head.project(token.h.squeeze(1))
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
    low, high = config.guidance_interval
    conditions = torch.cat([problems.condition, problems.unconditional])

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        if not (config.guidance != 1.0 and low <= t.detach() <= high):
            return model.head(z, t, problems.condition)  # type: ignore[no-any-return]
        conditional, unconditional = model.head(z.repeat(2, 1), t, conditions).chunk(2)
        return unconditional + problems.scale * (conditional - unconditional)  # type: ignore[no-any-return]

    z = solvers.INTEGRATORS[config.solver](velocity, problems.start, times.unsqueeze(-1), solvers.no_noise)
    return F.mse_loss(model.codec.normalise(z) if config.renormalise else z, problems.end)
