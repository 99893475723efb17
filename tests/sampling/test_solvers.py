"""Solvers against closed forms and for their order of convergence; the path's identities."""

import itertools
import math
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch

from pra.config import Solver, TimeGrid
from pra.method import flow
from pra.models.head import velocity_from_data
from pra.sampling import solvers

ORDERS = {Solver.EULER: 1} | dict.fromkeys((Solver.MIDPOINT, Solver.HEUN, Solver.ADAMS_BASHFORTH, Solver.DPM), 2)


def gaussian_velocity(mean, deviation):
    """The exact field from N(0, 1) to N(mean, deviation^2): E[z - eps | z_t] for jointly Gaussian z, eps, z_t."""

    def velocity(z_t, t):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        return mean + (t * deviation**2 - (1 - t)) / variance * (z_t - t * mean)

    return velocity


@pytest.mark.parametrize("solver", list(Solver))
def test_gaussian_target_is_sampled(solver):
    """The SDE samples it too: its marginals are the ODE's."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40_000, 1, generator=generator)
    times = solvers.uniform_grid(64, torch.zeros(40_000))
    velocity = Mock(wraps=gaussian_velocity(2.0, 0.5))
    z = solvers.INTEGRATORS[solver](velocity, start, times, lambda k: torch.randn(start.shape, generator=generator))
    assert velocity.call_count == 64 * solvers.EVALUATIONS[solver]
    assert z.mean().item() == pytest.approx(2.0, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, abs=0.03)


def test_grid_may_start_anywhere_on_a_straight_path():
    """Each element of the batch has its own start, as the exact rollout needs."""
    for solver, steps in itertools.product(ORDERS, (1, 4)):
        times = solvers.uniform_grid(steps, torch.tensor([[0.0], [0.6]]))
        torch.testing.assert_close(times[:, 1, 0], torch.linspace(0.6, 1.0, steps + 1))
        start, target = torch.zeros(2, 1, 3), torch.ones(2, 1, 3)
        moved = solvers.INTEGRATORS[solver](lambda z, t, v=target: v, start, times, solvers.no_noise)
        torch.testing.assert_close(moved[:, 0, 0], torch.tensor([1.0, 0.4]))


def test_path_ends_velocity_and_score():
    points, t = torch.linspace(-2, 3, 11).unsqueeze(-1), torch.full((11,), 0.4)
    v, variance = gaussian_velocity(2.0, 0.5)(points, t), 0.6**2 + (0.4 * 0.5) ** 2
    torch.testing.assert_close(flow.score(v, points, t.unsqueeze(-1)), -(points - 0.8) / variance)
    eps, z = torch.randn(2, 4, 3)
    assert torch.equal(flow.interpolate(eps, z, torch.zeros(1)), eps)
    assert torch.equal(flow.interpolate(eps, z, torch.ones(1)), z)
    z_t = flow.interpolate(eps, z, torch.tensor(0.3))
    torch.testing.assert_close(velocity_from_data(z, z_t, torch.tensor(0.3)), flow.velocity(eps, z))


def test_times():
    key = torch.arange(2000)
    uniform = flow.uniform_times(key, 50, low=0.2, high=0.7)
    assert 0.2 <= uniform.min() < 0.21
    assert 0.69 < uniform.max() < 0.7
    logit = flow.logit_normal_times(key, 50)
    assert 0 < logit.min() < logit.max() < 1
    # P(sigmoid(x) < 0.25) = Phi(-log 3) = 0.136
    assert (logit < 0.25).float().mean().item() == pytest.approx(0.136, abs=0.005)
    jit = flow.logit_normal_times(key, 50, mean=-0.8, std=0.8).logit()  # JiT's times lean towards the noise
    assert (jit.mean().item(), jit.std().item()) == pytest.approx((-0.8, 0.8), abs=0.01)


@pytest.mark.parametrize("grid", [TimeGrid.UNIFORM, TimeGrid.COSINE])
@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("solver", ORDERS)
def test_solvers_converge_in_their_order(solver, numbers, grid):
    """Dividing the step by two divides the error by 2^order.

    On dz/dt = z cos(t), whose path from z ends at z exp(sin 1); solvers of several steps on the exact field from
    N(0, 1) to N(2, 1/4), whose path ends at 2 + z / 2. There midpoint would be of third order, by symmetry.
    """
    start = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
    field, end, errors = gaussian_velocity(2.0, 0.5), 2 + start / 2, []
    if solver not in (Solver.ADAMS_BASHFORTH, Solver.DPM):
        field, end = lambda z, t: z * t.cos().unsqueeze(-1), start * math.exp(math.sin(1))
    for steps in (80, 160, 320):
        times = solvers.time_grid(grid, steps).double()
        if numbers:
            times = times.tolist()
        z = solvers.INTEGRATORS[solver](lambda z, t: field(z, torch.as_tensor(t)), start, times, solvers.no_noise)
        errors.append((z - end).abs().max())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.35)


def test_grids_rise_from_noise_to_data():
    for grid, steps, shift in itertools.product(TimeGrid, (1, 2, 9), (0.5, 1.0, 3.0)):
        times = solvers.time_grid(grid, steps, shift)
        assert times.shape == (steps + 1,)
        assert (times[0], times[-1]) == (0, 1)
        assert (times.diff() > 0).all()


def test_grids_put_their_intervals_where_they_say():
    def widths(grid, shift=1.0):
        return solvers.time_grid(grid, 8, shift).diff()

    cosine, logit = widths(TimeGrid.COSINE), widths(TimeGrid.LOGIT_NORMAL)
    assert cosine.argsort().tolist()[:2] in ([0, 7], [7, 0])
    assert logit.argsort().tolist()[-2:] in ([0, 7], [7, 0])
    assert logit.argsort().tolist()[:2] in ([3, 4], [4, 3])
    # P(sigmoid(x) < t) = 1/4 at t = sigmoid(-0.6745)
    assert solvers.time_grid(TimeGrid.LOGIT_NORMAL, 4)[1].item() == pytest.approx(1 / (1 + math.exp(0.67449)), abs=1e-5)
    assert widths(TimeGrid.UNIFORM, 3.0).argmin() == 0
    assert widths(TimeGrid.UNIFORM, 0.5).argmin() == 7
    # SD3's shift: a noise of 1/2 becomes 3/4 at shift 3.
    assert solvers.time_grid(TimeGrid.UNIFORM, 2, 3.0)[1].item() == pytest.approx(0.25)


def test_the_times_that_solvers_ask_at():
    assert solvers.evaluation_times(Solver.MIDPOINT, [0.0, 0.5, 1.0]) == [0.0, 0.25, 0.5, 0.75]
    assert solvers.evaluation_times(Solver.HEUN, [0.0, 1.0]) == [0.0, 1.0]
    for solver in (Solver.EULER, Solver.EULER_MARUYAMA, Solver.ADAMS_BASHFORTH, Solver.DPM):
        assert solvers.evaluation_times(solver, [0.0, 0.4, 1.0]) == [0.0, 0.4]
