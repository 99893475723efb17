"""A grid learnt for a model's head: what it is learnt from, what it gains, how it is used."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.answer import caller
from support.models import LEARNED, random_jit, random_model
from support.refusal import refused

from pra import Sampler, load, save
from pra.commands.options import How
from pra.config import SamplingConfig, Solver, TimeGrid, from_dict, to_dict
from pra.sampling import learnt_grid, solvers
from pra.sampling.guidance import Plan
from pra.sampling.learnt_grid import learn_grid, learn_steps
from pra.utils.pixels import to_uint8

GUIDED = SamplingConfig(guidance=2.0, steps=2)


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(learnt_grid, "ROUNDS", 3)
    monkeypatch.setattr(learnt_grid, "FINE", 8)


def test_fine_solver_itself_has_no_error(few_rounds):
    """So the conditions, scales and starts that it is learnt from are those of sampling."""
    config = replace(GUIDED, steps=8, guidance_interval=(0.2, 0.7))
    found = learn_grid(random_model(), config, images=2)
    assert found.errors["uniform"] < 1e-4
    assert found.errors["cosine"] > 10 * found.errors["uniform"]


def test_late_turn_of_a_field_has_late_intervals(monkeypatch):
    model = random_model()

    def late(z, t, *_):
        turned = torch.cat([-z[..., 1:2], z[..., :1], z[..., 2:]], dim=-1)
        return 8 * torch.sigmoid(40 * (t - 0.8)).unsqueeze(-1) * turned

    start = torch.randn(600, 5, generator=torch.Generator().manual_seed(0))
    end = solvers.midpoint(late, start, torch.linspace(0, 1, 400).unsqueeze(-1), solvers.no_noise)
    nothing = torch.zeros(600, 1)
    problems = learnt_grid.Problems(nothing, nothing, start, nothing, model.codec.normalise(end))
    monkeypatch.setattr(learnt_grid, "sampled_problems", lambda *_: problems)
    monkeypatch.setattr(model.head, "forward", late)
    found = learn_grid(model, SamplingConfig(steps=4))
    assert found.errors["learnt"] < 0.5 * min(error for name, error in found.errors.items() if name != "learnt")
    assert sum(t > 0.7 for t in found.times) == 3  # of the uniform grid's 2
    assert SamplingConfig(steps=4, times=found.times).times == found.times


def test_grid_of_every_solver_rises(few_rounds):
    for solver in (Solver.ADAMS_BASHFORTH, Solver.DPM, Solver.HEUN, Solver.EULER):
        rounds = []
        found = learn_grid(random_model(), replace(GUIDED, solver=solver, steps=3), 2, progress=rounds.append)
        assert sum(rounds) == 2 * 3
        assert (found.times[0], found.times[-1]) == (0, 1)
        assert all(np.diff(found.times) > 0)


def test_grid_with_nothing_to_learn_is_refused():
    refused(lambda: learn_grid(random_jit(), GUIDED), code="unsupported", name="JiT")
    sde = replace(GUIDED, solver=Solver.EULER_MARUYAMA)
    refused(lambda: learn_grid(random_model(), sde), "adds noise", code="unsupported", name="solver")
    refused(lambda: learn_grid(random_model(), replace(GUIDED, steps=1)), "at least 2", name="steps", value=1)


def test_steps_go_where_the_field_turns(monkeypatch):
    """A field that turns by an angle of its condition: half a circle at the first positions, little at the last."""
    model, images, euler = random_model(), 4, SamplingConfig(solver=Solver.EULER)
    angle = torch.tensor([3.0, 2.0, 1.0] + [0.01] * 9).repeat_interleave(images).unsqueeze(1)

    def turning(z, t, condition, span=None):
        return condition * torch.cat([-z[..., 1:2], z[..., :1], 0 * z[..., 2:]], dim=-1)

    monkeypatch.setattr(model.head, "forward", turning)
    start = torch.randn(12 * images, 5, generator=torch.Generator().manual_seed(0))
    fine = torch.linspace(0, 1, 400).unsqueeze(-1)
    end = solvers.midpoint(lambda z, t: turning(z, t, angle), start, fine, solvers.no_noise)
    problems = learnt_grid.Problems(angle, angle, start, angle, model.codec.normalise(end))
    monkeypatch.setattr(learnt_grid, "sampled_problems", lambda *_: problems)
    found = learn_steps(model, euler, budget=2.0, images=images)
    counts = found.raster_steps
    assert len(counts) == 8
    assert counts[0] >= counts[1] > counts[2] == counts[-1] == 1
    evaluations, error = found.errors["learnt"]
    assert 1.5 < evaluations <= 2.0
    assert error < 0.5 * found.errors["2 everywhere"][1]
    Sampler(random_model(), solver="euler", raster_steps=counts)


def test_steps_of_every_solver_keep_to_the_budget(few_rounds):
    shortcut = random_model(head=replace(LEARNED.head, shortcut=True))
    for solver in (Solver.EULER, Solver.MIDPOINT, Solver.SHORTCUT):
        found = learn_steps(shortcut, replace(GUIDED, solver=solver), budget=3.2, images=2)
        each = solvers.EVALUATIONS[solver]
        assert found.errors["learnt"][0] <= 3.2
        assert f"{3 // each} everywhere" in found.errors or solver is Solver.SHORTCUT
        sampler = Sampler(shortcut, solver=solver, raster_steps=found.raster_steps)
        assert sampler.sample([1], [2]).isfinite().all()


def test_steps_with_nothing_to_learn_are_refused():
    refused(lambda: learn_steps(random_jit(), GUIDED, 4), code="unsupported", name="JiT")
    sde = replace(GUIDED, solver=Solver.EULER_MARUYAMA)
    refused(lambda: learn_steps(random_model(), sde, 4), "adds noise", code="unsupported", name="solver")
    for budget in (1.5, -1.0, float("nan"), float("inf")):
        refused(lambda budget=budget: learn_steps(random_model(), GUIDED, budget), "Use at least 2", name="budget")
    refused(lambda: learn_steps(random_model(), GUIDED, 4, images=1), "at least 2", name="images", value=1)


def test_guidance_interval_includes_both_ends():
    """Times are float32, where 0.4 is a little more than it is as a number of a person."""
    config = SamplingConfig(guidance=2.0, solver=Solver.EULER, steps=2, times=(0.0, 0.4, 1.0))
    for interval in ((0.0, 0.4), (0.4, 1.0)):
        assert Plan.of_head(replace(config, guidance_interval=interval), 4).within() == (interval[0] == 0.0, True)


@pytest.mark.parametrize("make", [random_model, random_jit])
def test_times_are_the_grid(make):
    model = make()
    uniform = Sampler(model, replace(GUIDED, steps=4)).sample([1], [2])
    written = replace(GUIDED, steps=4, times=(0.0, 0.25, 0.5, 0.75, 1.0))
    assert torch.equal(Sampler(model, written).sample([1], [2]), uniform)
    other = replace(written, times=(0.0, 0.1, 0.2, 0.3, 1.0))
    assert not torch.allclose(Sampler(model, other).sample([1], [2]), uniform, atol=1e-3)
    assert from_dict(SamplingConfig, to_dict(other)) == other


def test_commands_learn_and_take_a_grid(run, tmp_path, capsys, few_rounds):
    call = caller(capsys)
    text = call("grid", run, "--steps", "3", "--images", "2", "--device", "cpu").out
    assert len(re.findall(r"^  (\S+) +\d\.\d{4}$", text, re.MULTILINE)) == len(TimeGrid) + 1
    times = text.split("--times ")[1].strip()
    words = "sample", run, "--labels", "3", "--seeds", "0", "--device", "cpu", "--out", tmp_path / "a.npz"
    assert call(*words, "--times", times).code == 0
    model = load(run)
    config = replace(model.sampling, steps=3, times=tuple(map(float, times.split(","))))
    expected = to_uint8(Sampler(model, config).sample([3], [0])).permute(0, 2, 3, 1).numpy()
    assert (np.load(tmp_path / "a.npz")["arr_0"] == expected).all()
    text = call("grid", run, "--budget", "2.5", "--solver", "euler", "--images", "2", "--device", "cpu").out
    line = text.splitlines()[-1]
    assert re.search(r" --solver euler --device cpu --raster-steps \d(,\d)+$", line), text
    assert call(*line.split()[1:], "--labels", "3", "--seeds", "0", "--out", tmp_path / "b.npz").code == 0
    assert call("grid", run, "--budget", "1").is_refusal("midpoint, which takes 2. Use at least 2")
    assert call("grid", run, "--images", "0").is_refusal("--images 0 must be at least 1")


def test_commands_take_steps_along_the_raster(run, tmp_path, capsys):
    call, model = caller(capsys), load(run)
    words = "sample", run, "--labels", "3", "--seeds", "0", "--device", "cpu", "--out", tmp_path / "a.npz"
    assert call(*words, "--raster-steps", "3,1").code == 0
    sampler = Sampler(model, raster_steps=(3, 1))
    expected = sampler.sample([3], [0])
    assert (np.load(tmp_path / "a.npz")["arr_0"] == to_uint8(expected).permute(0, 2, 3, 1).numpy()).all()
    assert torch.equal([*sampler.stream([3], [0])][-1], expected)
    other = Sampler(model, steps=3, times=None)
    assert not torch.equal(other.sample([3], [0]), expected)
    half = model.config.grid[0] // 2  # the last row of the first stretch: both take as many steps so far
    pixels = half * model.config.patch_size
    assert torch.equal(expected[:, :, :pixels], other.sample([3], [0])[:, :, :pixels])
    assert torch.equal(
        sampler.complete(expected, half, [3], [0]),
        Sampler(model, steps=1, times=None).complete(expected, half, [3], [0]),
    )
    bad = call(*words[:-2], "--raster-steps", "3,x")
    assert bad.is_refusal("--raster-steps '3,x' needs whole numbers, such as 4,2,1")


def test_given_grid_replaces_a_models_own(run, tmp_path, capsys):
    """One's own times where the model has a grid; steps where it has times. The line of `pra grid` says all of it."""
    model = load(run)
    for name, changes in (("cosine", {"time_grid": TimeGrid.COSINE}), ("times", {"times": (0.0, 0.3, 1.0)})):
        model.sampling = replace(model.sampling, **{"steps": 2, **changes})
        save(model, tmp_path / name)
        model.sampling = replace(model.sampling, time_grid=TimeGrid.UNIFORM, times=None)
    given = How(times="0,0.4,1").sampler(tmp_path / "cosine", torch.device("cpu")).config
    assert (given.times, given.time_grid) == ((0.0, 0.4, 1.0), TimeGrid.UNIFORM)
    own = How(guidance=2.0).sampler(tmp_path / "times", torch.device("cpu")).config
    assert own.times == (0.0, 0.3, 1.0)
    for other in (How(steps=4), How(time_grid="cosine"), How(shift=2.0)):
        assert other.sampler(tmp_path / "times", torch.device("cpu")).config.times is None
    words = ["--guidance", "2", "--schedule", "linear", "--guidance-interval", "0.2,0.7", "--average", "raw"]
    assert How(guidance=2, schedule="linear", guidance_interval="0.2,0.7", average="raw").words("steps") == words
