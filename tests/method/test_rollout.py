"""The inputs of the AR pass: what each rollout feeds, and that PRA's is what sampling would feed."""

import pytest
import torch
from support.models import ALL, batch, random_model
from support.refusal import refused

from pra import config
from pra.config import SamplingConfig, Solver
from pra.method import noise, rollout
from pra.sampling import Sampler, Steps, exact_rollout

ROLLOUTS = [config.Clean(), config.Noised(sigma=0.1), config.Reconstructed(), config.Parallel(), config.Exact(steps=1)]


@pytest.fixture(params=ALL)
def scene(request):
    model = random_model(ALL[request.param])
    images, labels, keys = batch(model.config)
    patches = model.patchify(images)
    with torch.no_grad():
        states = model.codec.encode(patches, model.clean_conditions(labels, patches))
    return model, labels, patches, states, keys


def test_noised_is_the_prefix_with_the_stated_deviation():
    true = torch.randn(200, 12, 12)
    assert torch.equal(rollout.clean(true), true[:, :11])
    patches = torch.zeros(200, 12, 12)
    x = rollout.noised(patches, 0.3, torch.arange(200))
    assert x.shape == (200, 11, 12)
    assert x.std().item() == pytest.approx(0.3, abs=0.005)
    assert x.mean().item() == pytest.approx(0.0, abs=0.005)


@torch.no_grad()
def test_parallel_at_t_1_is_sequential_decoding(scene):
    """Rollout parity: from the same states, the parallel inputs equal those of step-by-step decoding."""
    model, labels, _, states, keys = scene
    parallel = rollout.parallel(model, states, 1.0, keys)
    torch.testing.assert_close(parallel, rollout.reconstructed(model, states))
    steps, written = Steps(model, config.SamplingConfig(), len(labels)), []
    for i in range(11):
        steps.seek(i)
        written.append(steps.write(states[:, i : i + 1]))
    sequential = torch.cat(written, dim=1)
    torch.testing.assert_close(parallel, sequential, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_parallel_perturbs_more_as_t_min_falls():
    model = random_model()
    states = model.codec.normalise(torch.randn(64, 12, 5))
    keys = noise.keys(0, torch.arange(64))
    true = rollout.reconstructed(model, states)
    distance = [(rollout.parallel(model, states, t, keys) - true).square().mean().item() for t in (1.0, 0.7, 0.3, 0.0)]
    assert distance[0] < 1e-10 < distance[1] < distance[2] < distance[3]


@torch.no_grad()
def test_parallel_positions_are_perturbed_independently():
    """t_i ~ U(t_min, 1) per position, and no position's noise reaches an earlier one."""
    t, eps = rollout.perturbation(torch.zeros(400, 11, 5), 0.4, 1.0, noise.keys(0, torch.arange(400)))
    assert 0.4 <= t.min() < 0.41
    assert 0.99 < t.max() < 1
    assert (torch.corrcoef(t[..., 0].T) - torch.eye(11)).abs().max() < 0.2
    assert (torch.corrcoef(eps.flatten(1).T) - torch.eye(55)).abs().max() < 0.25


@torch.no_grad()
def test_exact_at_t_1_keeps_the_states(scene):
    """Nothing is left to integrate: the model writes the given states."""
    model, labels, _, states, keys = scene
    read = exact_rollout(model, labels, states, config.Exact(t_min=1.0, t_max=1.0, steps=2), keys)
    same = model.codec.normalise(states)
    torch.testing.assert_close(read, rollout.reconstructed(model, same), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_exact_from_noise_is_sampling(scene, monkeypatch):
    """t = 0 everywhere: the very pixels the sampler makes from the same noise, without guidance."""
    model, labels, _, states, _ = scene
    seeds = [4, 5, 6]
    sampled = Sampler(model, SamplingConfig(solver=Solver.MIDPOINT, steps=3, deblock=False)).sample(labels, seeds)
    key = noise.fold(noise.keys(0, torch.tensor(seeds)), noise.Purpose.SAMPLE_START)
    start = torch.zeros(3, 11, 1), noise.normal(key, 12, states.shape[2])[:, :11]
    monkeypatch.setattr(rollout, "perturbation", lambda z, low, high, key: start)
    read = exact_rollout(model, labels, states, config.Exact(t_min=0.0, t_max=0.0, steps=3), seeds)
    torch.testing.assert_close(read, model.patchify(sampled)[:, :11], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rollout_depends_on_its_own_sample_only(scene):
    model, *given = scene
    for how in ROLLOUTS:
        whole = rollout.ar_inputs(how, model, *given)
        assert whole.shape == (3, 11, model.config.group_dim)
        alone = rollout.ar_inputs(how, model, *(tensor[1:2] for tensor in given))
        torch.testing.assert_close(alone, whole[1:2], atol=1e-4, rtol=1e-4)


def test_impossible_rollouts_are_refused():
    refused(lambda: config.Parallel(t_min=1.5), "[0, 1]", name="t_min", value=1.5)
    refused(lambda: config.Noised(sigma=-1.0), name="sigma", value=-1.0)
    refused(lambda: config.Exact(t_min=0.8, t_max=0.5), "[0, 0.5]", name="t_min", value=0.8)
