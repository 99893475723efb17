"""A head that takes its flow in few steps: what it learns, and how it is sampled."""

from dataclasses import replace

import pytest
import torch
from support.models import LEARNED, batch, random_model
from support.refusal import refused

from pra import Sampler, config
from pra.config import SHORTCUT_STEPS, ObjectiveConfig, Precision, SamplingConfig, Solver, TimeGrid
from pra.method import flow, noise
from pra.method.objectives import shortcut_loss, training_losses
from pra.sampling.runner import Engine, cache_bytes

SHORT = replace(LEARNED, head=replace(LEARNED.head, shortcut=True))
GUIDED = replace(SHORT, head=replace(SHORT.head, shortcut_guidance=4.0))


def test_dyadic_steps_cover_the_path_and_equal_a_table(monkeypatch):
    t, span = flow.dyadic_steps(noise.keys(0, torch.arange(4)), len(SHORTCUT_STEPS), 500)
    assert t.shape == span.shape == (4, 500)
    assert {float(s) for s in span.flatten().unique()} == {1.0, 0.5, 0.25, 0.125}
    for count in SHORTCUT_STEPS:
        starts = t[span == 1 / count]
        assert sorted(float(start) for start in starts.unique()) == [k / count for k in range(count)]
        assert len(starts) == pytest.approx(500, rel=0.2)
    assert [2**k for k in range(len(SHORTCUT_STEPS))] == list(SHORTCUT_STEPS)
    key = noise.keys(7, torch.arange(64))
    which, where = noise.uniform(noise.fold(key, 0), 300), noise.uniform(noise.fold(key, 1), 300)
    count = torch.tensor(SHORTCUT_STEPS, dtype=torch.float32)[(which * 4).long()]
    # No table is sent to the device, which the host would wait for.
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a table"))
    t, span = flow.dyadic_steps(key, len(SHORTCUT_STEPS), 300)
    assert torch.equal(span, 1 / count)
    assert torch.equal(t, torch.minimum((where * count).floor(), count - 1) / count)


class Shrinking(torch.nn.Module):
    """``dz/dt = -rate z``, with the exact mean over a step; or, ``honest=False``, the velocity at its start."""

    def __init__(self, rate, honest):
        super().__init__()
        self.rate, self.honest = rate, honest

    def project(self, h):
        return h

    def forward(self, z, t, condition, span=None, scale=None):
        mean = torch.full_like(t, self.rate)
        if span is not None and self.honest:
            mean = (1 - torch.exp(-self.rate * span)) / span
        return -mean.unsqueeze(-1) * z


def test_shortcut_loss_is_least_for_the_exact_mean():
    """The midpoint rule of the shortest steps is near enough; the velocity at the start of a step is not a solution."""
    rate = 2.0
    keys = noise.keys(0, torch.arange(8))
    h, z = torch.zeros(8, 12, 32), noise.normal(keys, 12, 5)
    exact, start = (
        shortcut_loss(Shrinking(rate, True), Shrinking(rate, honest), h, z, ObjectiveConfig(shortcut_draws=4), keys)
        for honest in (True, False)
    )
    shortest = rate**3 * (1 / 8) ** 2 / 6  # the midpoint rule's error of the mean velocity, per unit of z
    assert exact < shortest**2
    assert start > 20 * exact


class Constant(torch.nn.Module):
    """A velocity that the condition says; the second head's also depends on the scale of guidance."""

    def __init__(self, slope=0.0):
        super().__init__()
        self.slope = slope

    def project(self, h):
        return h

    def forward(self, z, t, condition, span=None, scale=None):
        extra = 0.0 if scale is None else self.slope * (scale.unsqueeze(-1) - 1)
        return condition[..., :1] + extra + torch.zeros_like(z)


def test_shortcut_loss_is_zero_for_the_guided_velocity():
    """``v_u + s (v_c - v_u)`` with 3 and 1 is ``3 + 2 (s - 1)``."""
    keys = noise.keys(0, torch.arange(8))
    h, z = torch.full((8, 12, 32), 3.0), noise.normal(keys, 12, 5)
    given = h, z, ObjectiveConfig(shortcut_draws=4), keys, (torch.ones(8, 12, 32), 5.0)
    assert shortcut_loss(Constant(), Constant(2.0), *given) < 1e-10
    wrong = [shortcut_loss(Constant(), Constant(slope), *given) for slope in (0.0, 1.0, 3.0)]
    assert min(wrong) > 0.1
    assert wrong[0] > wrong[1]


@pytest.mark.parametrize("model", [SHORT, GUIDED])
def test_shortcut_loss_trains_the_second_head_alone(model):
    told, model = model is GUIDED, random_model(model)
    given = *batch(SHORT), ObjectiveConfig(), config.Parallel(t_min=0.5)
    losses = training_losses(model, *given)
    losses.terms["shortcut"].backward(retain_graph=True)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached
    assert all(name.startswith("shortcut.") for name in reached)
    assert any(name.startswith("shortcut.span_in") for name in reached)
    assert any(name.startswith("shortcut.scale_in") for name in reached) == told
    weights = {"pixel": 1.0, "flow": 1.0, "auxiliary": ObjectiveConfig().auxiliary_weight, "shortcut": 1.0}
    assert losses.terms.keys() == weights.keys()
    assert "shortcut" not in training_losses(random_model(), *given).terms
    torch.testing.assert_close(losses.total, sum(weights[name] * term for name, term in losses.terms.items()))


def test_shortcut_learns_to_take_one_step():
    """One step ends where many steps of the first head do on a curved flow; Euler's does not."""
    torch.manual_seed(0)
    model = random_model(replace(SHORT, codec=replace(SHORT.codec, state_dim=3)))
    head, short, h = model.head, model.shortcut, torch.zeros(1, 1, 32)
    optimizer = torch.optim.Adam([*head.parameters(), *short.parameters()], 6e-3)
    two = torch.tensor([-1.0, 1.0])
    for step in range(80):
        keys = noise.keys(step, torch.arange(64))
        z = two[torch.randint(2, (64, 1, 1))] * torch.tensor([1.0, 0.5, -1.0])  # two points: the velocity turns late
        t = flow.uniform_times(noise.fold(keys, 1), 1)
        eps = noise.normal(noise.fold(keys, 2), 1, 3)
        velocity = head(flow.interpolate(eps, z, t.unsqueeze(-1)), t, head.project(h))
        loss = (velocity - flow.velocity(eps, z)).square().mean()
        loss = loss + shortcut_loss(head, short, h.expand(64, 1, 32), z, ObjectiveConfig(), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def walk(head, count, *span):
        z = noise.normal(noise.keys(9, torch.arange(256)), 1, 3)
        for k in range(count):
            t = torch.full((256, 1), k / count)
            z = z + head(z, t, head.project(h), *span) / count
        return z

    with torch.no_grad():
        many = walk(head, 64)
        ends = walk(short, 1, torch.ones(256, 1)), walk(head, 1)
        errors = [(end - many).norm(dim=-1).mean().item() for end in ends]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("model", "changes", "code", "words"),
    [
        (LEARNED, {"steps": 4}, "unsupported", "model.head.shortcut=true"),
        (SHORT, {"steps": 3}, "conflict", "1, 2, 4, 8"),
        (SHORT, {"steps": 16}, "conflict", "steps 16"),
        (SHORT, {"steps": 4, "shift": 2.0}, "conflict", "shift 2"),
        (SHORT, {"steps": 4, "time_grid": TimeGrid.COSINE}, "conflict", "cosine"),
    ],
)
def test_shortcut_solver_refuses_other_grids(model, changes, code, words):
    settings = SamplingConfig(solver=Solver.SHORTCUT, **changes)
    refused(lambda: Sampler(random_model(model), settings), words, code=code, name="solver")


def test_guided_shortcut_refuses_scales_it_has_not_learnt():
    model = random_model(GUIDED)
    for scale in (0.5, 4.5):
        wrong = SamplingConfig(solver=Solver.SHORTCUT, steps=2, guidance=scale)
        refused(lambda wrong=wrong: Sampler(model, wrong), "1 to 4", name="guidance", value=f"{scale:g}")
        Sampler(model, replace(wrong, solver=Solver.EULER))
    wrong = SamplingConfig(solver=Solver.SHORTCUT, steps=2, guidance_interval=(0.0, 0.5))
    refused(lambda: Sampler(model, wrong), name="guidance_interval", value="0,0.5")
    for changes in ({"shortcut": False, "shortcut_guidance": 4.0}, {"shortcut_guidance": 1.0}):
        refused(lambda changes=changes: replace(SHORT.head, **changes), "above 1", name="shortcut_guidance")
    assert config.from_dict(type(GUIDED), config.to_dict(GUIDED), "model") == GUIDED


def test_guided_shortcut_takes_one_stream():
    settings = SamplingConfig(solver=Solver.SHORTCUT, steps=2, guidance=3.0)
    one, two = (Engine(random_model(model), settings, 3, Precision.FLOAT32) for model in (GUIDED, SHORT))
    assert (one.steps.streams, two.steps.streams) == (1, 2)
    half, whole = (cache_bytes(random_model(model), settings, Precision.FLOAT32, False) for model in (GUIDED, SHORT))
    assert half < 0.7 * whole
    scales = [Sampler(random_model(GUIDED), replace(settings, guidance=s)).sample([1], [2]) for s in (1.0, 3.0)]
    assert not torch.allclose(*scales, atol=1e-3)


def test_shortcut_needs_a_head_of_velocities():
    wrong = lambda: config.HeadConfig(depth=2, width=8, prediction=config.Prediction.DATA, shortcut=True)  # noqa: E731
    refused(wrong, "shortcut", code="conflict", name="prediction", value="data")
    assert config.from_dict(type(SHORT), config.to_dict(SHORT), "model") == SHORT
