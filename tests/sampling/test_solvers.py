"""Solvers against closed forms and for their order of convergence; the path's identities."""

import math
from itertools import pairwise

import pytest
import torch

from pra.config import Solver
from pra.method import flow
from pra.models.head import velocity_from_data
from pra.sampling import solvers

DETERMINISTIC = [(Solver.EULER, 1), (Solver.MIDPOINT, 2), (Solver.HEUN, 2)]


def integrate(solver, steps, velocity, start):
    times = solvers.uniform_grid(steps, torch.zeros(start.shape[:-1], dtype=torch.float64))
    return solvers.INTEGRATORS[solver](velocity, start, times, solvers.no_noise)


@pytest.mark.parametrize(("solver", "order"), DETERMINISTIC)
def test_order_of_convergence(solver, order):
    """dz/dt = z cos(t), z(0) = 1, has z(1) = exp(sin 1); halving the step divides the error by 2^order."""

    def velocity(z, t):
        return z * torch.cos(t).unsqueeze(-1)

    start = torch.ones(4, 1, dtype=torch.float64)
    errors = [(integrate(solver, k, velocity, start) - math.exp(math.sin(1))).abs().max() for k in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", [s for s, _ in DETERMINISTIC])
def test_a_straight_path_takes_one_step(solver):
    target, start = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(integrate(solver, 1, lambda z, t: target - start, start), target)


@pytest.mark.parametrize("solver", list(Solver))
def test_evaluations_are_counted(solver):
    calls = []

    def velocity(z, t):
        calls.append(t)
        return -z

    times = solvers.uniform_grid(7, torch.zeros(2, 1))
    solvers.INTEGRATORS[solver](velocity, torch.ones(2, 1, 3), times, lambda k: torch.zeros(2, 1, 3))
    assert len(calls) == 7 * solvers.EVALUATIONS[solver]


def gaussian_velocity(mean, deviation):
    """The exact field from N(0, 1) to N(mean, deviation^2): E[z - eps | z_t] for jointly Gaussian z, eps, z_t."""

    def velocity(z_t, t):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        return mean + (t * deviation**2 - (1 - t)) / variance * (z_t - t * mean)

    return velocity


@pytest.mark.parametrize("solver", list(Solver))
def test_gaussian_target_is_sampled(solver):
    """Also for the SDE: its marginals are the ODE's."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40_000, 1, generator=generator)
    times = solvers.uniform_grid(64, torch.zeros(40_000))
    z = solvers.INTEGRATORS[solver](
        gaussian_velocity(2.0, 0.5), start, times, lambda k: torch.randn(start.shape, generator=generator)
    )
    assert z.mean().item() == pytest.approx(2.0, abs=0.02)
    assert z.std().item() == pytest.approx(0.5, abs=0.03)


def test_score_of_a_gaussian():
    z, t = torch.linspace(-2, 3, 11).unsqueeze(-1), torch.full((11,), 0.4)
    v = gaussian_velocity(2.0, 0.5)(z, t)
    variance = 0.6**2 + (0.4 * 0.5) ** 2
    torch.testing.assert_close(flow.score(v, z, t.unsqueeze(-1)), -(z - 0.8) / variance)


def test_grid_may_start_anywhere():
    """Each element of the batch has its own start, as the exact rollout needs."""
    times = solvers.uniform_grid(4, torch.tensor([[0.0], [0.6]]))
    torch.testing.assert_close(times[:, 1, 0], torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0]))
    target = torch.ones(2, 1, 3)
    z = torch.zeros(2, 1, 3)
    moved = solvers.midpoint(lambda z, t: target, z, times, solvers.no_noise)
    torch.testing.assert_close(moved[:, 0, 0], torch.tensor([1.0, 0.4]))


def test_path_ends_and_velocity():
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
