"""JiT, the diffusion baseline: what it sees, what it predicts, how it is trained, sampled, saved and gone on with."""

import dataclasses
import json

import pytest
import torch
from support.answer import caller
from support.models import JIT, JITS, batch, random_jit
from support.refusal import refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pra
from pra import Sampler
from pra.config import Clean, GuidanceSchedule, JiTConfig, ObjectiveConfig, SamplingConfig, Solver, apply_settings
from pra.evaluation.evaluate import check_codec
from pra.evaluation.flops import sampling_flops, training_flops
from pra.method import flow, noise
from pra.method.noise import Purpose
from pra.method.objectives import training_losses
from pra.models import JiT, build_model
from pra.sampling.learnt_grid import learn_grid
from pra.training.run import loss_terms

LABELS, SEEDS = [0, 4, 2, 2], [10, 11, 12, 13]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def noised(config, size=3):
    """Patches between noise and image, their times and labels."""
    generator = torch.Generator().manual_seed(4)
    x_t = torch.randn(size, config.num_patches, config.patch_dim, generator=generator)
    return x_t, torch.rand(size, 1, generator=generator), torch.arange(size)


@pytest.mark.parametrize("name", JITS)
@torch.no_grad()
def test_every_patch_sees_every_other_and_a_new_jit_is_grey(name):
    model, new = random_jit(JITS[name]), JiT(JITS[name])
    x_t, t, labels = noised(model.config)
    velocity = model(x_t, t, labels)
    for changed, read in ((11, 0), (0, 11), (5, 6)):
        other = x_t.clone()
        other[:, changed] += 1.0
        assert (model(other, t, labels)[:, read] - velocity[:, read]).abs().amax(dim=-1).min() > 1e-4
    t[0] = 0.99  # beyond the clamp
    assert torch.equal(new(x_t, t, labels), -x_t / (1 - t).clamp(min=0.05).unsqueeze(-1))


@torch.no_grad()
def test_time_class_and_place_matter():
    model = random_jit()
    x_t, t, labels = noised(model.config)
    x_t = x_t[:, :1].expand(-1, 12, -1)  # all patches alike
    data = model(x_t, t, labels) * (1 - t).clamp(min=0.05).unsqueeze(-1) + x_t
    assert (data[:, 0] - data[:, 7]).abs().max() > 1e-3
    assert (model(x_t, t, labels + 1) - model(x_t, t, labels)).abs().max() > 1e-3
    later = model(x_t, t / 2, labels) * (1 - t / 2).clamp(min=0.05).unsqueeze(-1) + x_t
    assert (later - data).abs().max() > 1e-3


@pytest.mark.parametrize("logit_normal", [True, False])
def test_loss_of_a_constant_prediction(logit_normal):
    """A model whose bias is an image's one grey knows it exactly; one that says 0 is wrong by ``grey / (1 - t)``."""
    model, (_, labels, keys) = JiT(JIT), batch(JIT)
    objective = ObjectiveConfig(logit_normal_times=logit_normal, time_mean=-0.8, time_std=0.8)
    given = torch.full((3, 3, 6, 8), 0.6), labels, keys, objective, Clean()
    key = noise.fold(keys, Purpose.FLOW_TIME)
    t = flow.logit_normal_times(key, 1, mean=-0.8, std=0.8) if logit_normal else flow.uniform_times(key, 1)
    wrong = training_losses(model, *given)
    torch.testing.assert_close(wrong.terms["flow"], (0.6 / (1 - t).clamp(min=0.05)).square().mean())
    assert wrong.total == wrong.terms["flow"]
    assert [*wrong.terms] == ["flow"]
    with torch.no_grad():
        model.out.bias.fill_(0.6)
    assert training_losses(model, *given).terms["flow"].item() == pytest.approx(0.0, abs=1e-10)


def test_guidance_and_seeds_by_formula():
    """One Euler step from the noise of each seed."""
    model = random_jit()
    settings = SamplingConfig(guidance=2.5, solver=Solver.EULER, steps=1, temperature=0.1)
    images = Sampler(model, settings).sample([1, 3], [7, 8])
    start = 0.1 * noise.normal(noise.fold(noise.keys(0, torch.tensor([7, 8])), Purpose.SAMPLE_START), 12, 12)
    with torch.no_grad():
        with_class = model(start, torch.zeros(2, 1), torch.tensor([1, 3]))
        without = model(start, torch.zeros(2, 1), torch.tensor([5, 5]))
    expected = start + without + 2.5 * (with_class - without)
    close(images, model.unpatchify(expected).clamp(-1, 1))
    assert (images.abs() < 1).any()


@pytest.mark.parametrize("solver", [solver for solver in Solver if solver is not Solver.SHORTCUT])
def test_constant_prediction_is_what_is_sampled(solver):
    model = JiT(JIT)
    with torch.no_grad():
        model.out.bias.fill_(0.6)
    images = Sampler(model, SamplingConfig(solver=solver, steps=20)).sample(LABELS, SEEDS)
    close(images, torch.full((4, 3, 6, 8), 0.6))


def test_last_interval_is_eulers(monkeypatch):
    model, asked = random_jit(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, t, *told: (asked.append(t.item()), forward(x, t, *told))[1])
    Sampler(model, SamplingConfig(solver=Solver.HEUN, steps=4)).sample(LABELS, SEEDS)
    assert asked == [0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    asked.clear()
    Sampler(model, SamplingConfig(solver=Solver.MIDPOINT, steps=1)).sample(LABELS, SEEDS)
    assert asked == [0.0]


class Painter(JiTConfig):
    """Another kind of model that makes all patches at once."""

    name = "Painter"


@pytest.mark.parametrize("kind", [JiTConfig, Painter])
def test_what_takes_a_raster_is_refused(kind):
    model, name = random_jit(kind(**vars(JIT))), kind.name
    images, labels, _ = batch(JIT, 4)
    refused(lambda: Sampler(model).complete(images, 1, LABELS, SEEDS), code="unsupported", name=name)
    refused(lambda: list(Sampler(model).stream(LABELS, SEEDS, keep=images[:, :, :2])), code="unsupported", name=name)
    linear = SamplingConfig(guidance=2.0, schedule=GuidanceSchedule.LINEAR)
    refused(lambda: Sampler(model, linear), name, code="unsupported", value="linear")
    refused(lambda: learn_grid(model, SamplingConfig()), code="unsupported", name=name)
    refused(lambda: check_codec(model), "does not have a codec", "--reconstruction")
    assert torch.equal(model.reconstruct(images, labels), images)


def measured(work):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_counted_arithmetic_is_what_runs():
    tiny = pra.recipe("tiny:jit")
    model = build_model(tiny.model)
    for guidance in (1.0, 2.0):
        # Both streams of guidance are counted in full, though they share what is made of the time alone.
        run = dataclasses.replace(tiny, sampling=dataclasses.replace(tiny.sampling, guidance=guidance, steps=2))
        ran = measured(lambda run=run: Sampler(model, run.sampling).sample([1], [2]))
        assert sampling_flops(run)["transformer"] == pytest.approx(ran, rel=0.02)
    images, labels, keys = batch(run.model, 1)

    def step():
        training_losses(model, images, labels, keys, run.train.objective, Clean()).total.backward()

    assert training_flops(run) == pytest.approx(measured(step), rel=0.02)


def test_jit_learns_one_batch():
    model, inputs, flows = JiT(JIT), batch(JIT), []
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = training_losses(model, *inputs, ObjectiveConfig(), Clean()).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flows.append(loss.item())
    assert flows[-1] < 0.6 * flows[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of tiny:jit."""
    folder = tmp_path_factory.mktemp("jit") / "run"
    settings = ["sampling.steps=2", "train.steps=4", "train.sample_every=2", "train.log_every=2"]
    return pra.train(apply_settings(pra.recipe("tiny:jit"), settings), folder, device="cpu", progress=False).run


def test_run_of_jit_has_samples_and_no_reconstructions(trained):
    assert [path.name for path in sorted((trained / "samples").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    assert not (trained / "reconstructions").exists()
    row = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["flow"] == row["total"] > 0
    assert loss_terms([row]) == ["flow"]


def test_commands_take_a_run_of_jit(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    call = caller(capsys)
    call("sample", trained, "--labels", "0,1", "--seeds", "0", "--steps", "2", "--out", tmp_path / "s.png")
    parallel = "--set", "train.rollout=Parallel", "--run-dir", tmp_path / "r"
    for text, words in (
        ("JiT cannot complete", ("complete", trained, tmp_path / "s.png", "--rows", 1)),
        ("schedule linear", ("sample", trained, "--schedule", "linear", "--out", tmp_path / "no.png")),
        ("train.rollout Parallel", ("train", "tiny:jit", *parallel)),
    ):
        assert call(*words).is_refusal(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.png"]
