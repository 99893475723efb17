"""The sampler: equal to the formulas, one image per seed, streaming and completion."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import ALL, GROUPS, LEARNED, PIXEL, batch, random_jit, random_model
from support.refusal import refused

from pra import PraError, Sampler
from pra.config import GuidanceSchedule, Precision, SamplingConfig, Solver, TimeGrid, from_dict, to_dict
from pra.method import noise
from pra.method.objectives import training_losses
from pra.models import build_model
from pra.recipes import recipe
from pra.sampling import solvers
from pra.sampling.guidance import scale_at

LABELS, SEEDS = [0, 4, 2, 2], [10, 11, 12, 13]
SETTINGS = {
    "plain": SamplingConfig(),
    "guided": SamplingConfig(guidance=3.0, solver=Solver.EULER, steps=2),
    "linear": SamplingConfig(guidance=3.0, schedule=GuidanceSchedule.LINEAR, solver=Solver.HEUN, steps=2),
    "sde": SamplingConfig(guidance=2.0, solver=Solver.EULER_MARUYAMA, steps=4, temperature=0.8),
    "free": SamplingConfig(guidance=0.5, renormalise=False, steps=1),
}


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", ["guided", "sde"])
@pytest.mark.parametrize("make", [random_model, random_jit])
def test_image_is_a_function_of_label_and_seed(make, settings):
    """An image must not depend on the batch, its order or torch's random state."""
    sampler = Sampler(make(), SETTINGS[settings])
    torch.manual_seed(0)
    together = sampler.sample(LABELS, SEEDS)
    assert together.shape == (4, 3, 6, 8)
    assert together.abs().max() <= 1
    torch.manual_seed(1)
    *parts, last = sampler.stream(LABELS, SEEDS)
    assert torch.equal(last, together)
    assert [part.shape[2] for part in parts] == ([2, 4] if make is random_model else [])
    for part in parts:
        assert torch.equal(part, together[:, :, : part.shape[2]])
    order = [2, 0, 3, 1]
    close(sampler.sample([LABELS[i] for i in order], [SEEDS[i] for i in order]), together[order])
    close(sampler.sample(LABELS[1:2], SEEDS[1:2]), together[1:2])
    others = torch.cat([together, sampler.sample([1], SEEDS[:1])])
    for a, b in itertools.combinations(others, 2):
        assert (a - b).abs().max() > 0.01


def test_temperature_of_zero_leaves_nothing_to_chance():
    close(*Sampler(random_model(), temperature=0.0).sample([3, 3], [1, 2]).split(1))
    assert Sampler(random_model(num_classes=1), SETTINGS["guided"]).sample([0, 0], [1, 2]).shape == (2, 3, 6, 8)


def test_guidance_of_one_runs_one_stream():
    model, rows = random_model(), []
    model.head.register_forward_pre_hook(lambda head, inputs: rows.append(inputs[2].shape[:2]))
    for guidance, streams in ((1.0, 1), (2.0, 2)):
        rows.clear()
        Sampler(model, SamplingConfig(guidance=guidance)).sample(LABELS, SEEDS)
        assert set(rows) == {(streams, 4)}


def test_linear_guidance_rises_from_one_to_the_scale():
    scales = [scale_at(SETTINGS["linear"], i, 12) for i in range(12)]
    assert scales[0] == 1.0
    assert scales[-1] == 3.0
    assert all(b - a == pytest.approx(2 / 11) for a, b in itertools.pairwise(scales))
    assert scale_at(SETTINGS["guided"], 0, 12) == 3.0


@pytest.mark.parametrize("name", ALL)
def test_completion_keeps_true_pixels_exactly(name):
    model = random_model(ALL[name])
    images, _, _ = batch(model.config, 4)
    sampler = Sampler(model, SETTINGS["guided"], times=(0.0, 0.3, 1.0))
    close(sampler.complete(images, 0, LABELS, SEEDS), sampler.sample(LABELS, SEEDS))
    step = model.config.group[0]
    assert torch.equal(sampler.complete(images, 3 * step, LABELS, SEEDS), images)
    for rows in (step, 2 * step):
        completed = sampler.complete(images, rows, LABELS, SEEDS)
        assert completed.shape == images.shape
        assert torch.equal(completed[:, :, : 2 * rows], images[:, :, : 2 * rows])
        assert (completed[:, :, 2 * rows :] - images[:, :, 2 * rows :]).abs().max() > 0.01
        other = images.clone()
        other[:, :, 2 * rows :] = 0.0  # what is not kept does not matter
        assert torch.equal(sampler.complete(other, rows, LABELS, SEEDS), completed)


def test_completion_in_the_middle_of_a_group_is_refused():
    sampler, images = Sampler(random_model(GROUPS)), batch(GROUPS, 1)[0]
    parts = "2 rows are generated together", "multiple of 2"
    refused(lambda: sampler.complete(images, 3, [0], [0]), *parts, name="rows", value=3)
    refused(lambda: [*sampler.stream([0], [0], images[:, :, :6])], "k * 4", code="mismatch")


def test_stream_yields_every_row_of_groups():
    sampler = Sampler(random_model(GROUPS), SETTINGS["guided"])
    *parts, whole = sampler.stream(LABELS, SEEDS)
    assert [part.shape[2] for part in parts] == [4, 8]
    assert torch.equal(whole, sampler.sample(LABELS, SEEDS))


def test_completion_continues_what_was_kept():
    """Kept pixels act through backbone and decoder. Without a codec the completion of a sample equals the sample."""
    images, _, _ = batch(LEARNED, 1)
    one, two = (Sampler(random_model(LEARNED)).complete(x, 1, [0], [0])[:, :, 2:] for x in (images, -images))
    assert (one - two).abs().max() > 0.01
    sampler = Sampler(random_model(PIXEL), SETTINGS["guided"])
    whole = sampler.sample(LABELS, SEEDS)
    close(sampler.complete(whole, 2, LABELS, SEEDS), whole)


def test_images_that_are_not_finite_are_refused():
    sampler = Sampler(random_model(), SamplingConfig(temperature=1e300))
    parts = sampler.stream([0, 1], [0, 1])
    assert [next(parts).shape[2] for _ in range(2)] == [2, 4]
    with pytest.raises(PraError, match=r"2 of 2 images are not finite numbers. Try temperature .*\(now 1e\+300\)"):
        next(parts)
    with pytest.raises(PraError, match="1 of 1 images are not finite numbers"):
        Sampler(random_jit(), SamplingConfig(temperature=1e300)).sample([0], [0])


def test_model_brings_its_own_settings():
    model = random_model()
    model.sampling = SETTINGS["sde"]
    sampler = Sampler(model)
    assert torch.equal(sampler.sample([1], [2]), Sampler(model, SETTINGS["sde"]).sample([1], [2]))
    model.to("meta")  # it may move after its sampler is made
    assert sampler.device.type == "meta"


@pytest.mark.parametrize(
    ("labels", "seeds", "code", "words"),
    [
        ([6], [0], "invalid", "label 6 is out of range: this model's classes are 0 to 4"),
        ([-1], [0], "invalid", "label -1"),
        ([0, 1], [0], "mismatch", "2 labels and 1 seeds"),
        ([], [], "mismatch", "0 labels"),
        ([0.7], [0], "invalid", "labels must be whole numbers of 64 bits or names of classes, got [0.7]"),
        ("cta", 0, "unknown", "no class 'cta'; did you mean 'cat'?"),
        (["cat", 9], [0, 1], "invalid", "label 9"),
        ([0], ["0"], "invalid", "seeds must be whole numbers"),
        (torch.rand(40, 40), [0], "invalid", "labels must be whole numbers"),
        ([0], [2**64], "invalid", "seeds must be whole numbers of 64 bits"),
    ],
)
def test_bad_requests_are_refused(labels, seeds, code, words):
    model = random_model()
    model.classes = ("ant", "bee", "cat", "dog", "eel")
    refused(lambda: Sampler(model).sample(labels, seeds), words, code=code)


def test_labels_may_be_names_or_one_alone():
    model = random_model()
    model.classes = ("ant", "bee", "cat", "dog", "eel")
    sampler = Sampler(model)
    expected = sampler.sample([2, 4, 5], [7, 8, 9])
    for labels in (["cat", "eel", 5], np.array([2, 4, 5]), torch.tensor([2, 4, 5]), ("cat", 4, 5), iter([2, 4, 5])):
        assert torch.equal(sampler.sample(labels, range(7, 10)), expected)
    (one,) = expected[:1].split(1)
    for label in ("cat", 2, np.int64(2), torch.tensor(2)):
        close(sampler.sample(label, 7), one)
        close(list(sampler.stream(label, 7))[-1], one)
        close(sampler.complete(one, 0, label, 7), one)


def test_settings_by_name():
    model = random_model()
    model.sampling = SamplingConfig(guidance=1.5, steps=2, times=(0.0, 0.3, 1.0))
    assert Sampler(model, guidance=2, steps=2).config == replace(model.sampling, guidance=2.0)
    assert Sampler(model, model.sampling, guidance=np.float32(2)).config == replace(model.sampling, guidance=2.0)
    for changes in ({"steps": 4}, {"shift": 2.0}, {"time_grid": "cosine"}, {"time_grid": TimeGrid.COSINE}):
        config = Sampler(model, **changes).config
        assert config.times is None
        assert config.guidance == 1.5
    assert Sampler(model, precision="bfloat16").precision is Precision.BFLOAT16
    assert Sampler(model, solver="heun").config == Sampler(model, solver=Solver.HEUN).config
    model.sampling = SamplingConfig(steps=5, shift=2.0)
    for times in ((0.0, 0.4, 1.0), [0, 0.4, 1]):
        assert Sampler(model, times=times).config == SamplingConfig(steps=2, times=(0.0, 0.4, 1.0))
    given = SamplingConfig(guidance=3.0, steps=1)
    expected = Sampler(model, replace(given, temperature=0.5)).sample([1], [2])
    assert torch.equal(Sampler(model, given, temperature=0.5).sample([1], [2]), expected)


@pytest.mark.parametrize(
    ("changes", "code", "name", "words"),
    [
        ({"precision": "bfloat"}, "unknown", "precision", "did you mean 'bfloat16'?"),
        ({"guidence": 2.0}, "unknown", "guidence", "did you mean 'guidance'?"),
        ({"guidance": "much"}, "invalid", "sampling.guidance", "expected float, got 'much'"),
        ({"guidance": -1.0}, "invalid", "guidance", "[0, inf]"),
        ({"temperature": math.nan}, "invalid", "temperature", "nan"),
        ({"steps": 0}, "invalid", "steps", "positive"),
        ({"steps": 2.5}, "invalid", "sampling.steps", "expected int, got 2.5"),
        ({"solver": "huen"}, "unknown", "sampling.solver", "did you mean 'heun'?"),
        ({"shift": 0.0}, "invalid", "shift", "positive"),
        ({"guidance_interval": (0.5, 0.2)}, "invalid", "guidance_interval", "[0, 0.2], got 0.5"),
        ({"guidance_interval": (0.0, 1.5)}, "invalid", "guidance_interval", "1.5"),
        ({"guidance_interval": (math.nan, 1.0)}, "invalid", "guidance_interval", "nan"),
        ({"times": 3}, "invalid", "sampling.times", "3"),
        ({"times": (0.0, 1.0), "steps": 2}, "invalid", "times", "steps + 1 = 3 numbers rising from 0 to 1"),
        ({"times": (0.0, 0.5, 0.5)}, "invalid", "times", "0,0.5,0.5"),
        ({"times": (0.0, 0.5, 0.9)}, "invalid", "times", "rising from 0 to 1"),
        ({"times": (0.0, math.nan, 1.0)}, "invalid", "times", "rising from 0 to 1"),
        ({"times": (0.0, 0.4, 1.0), "shift": 2.0}, "conflict", "times", "shift 2"),
        ({"times": (0.0, 0.4, 1.0), "time_grid": TimeGrid.COSINE}, "conflict", "times", "time_grid cosine"),
    ],
)
def test_bad_settings_are_refused(changes, code, name, words):
    refused(lambda: Sampler(random_model(), **changes), words, code=code, name=name)


@pytest.mark.parametrize(
    ("shape", "rows", "words"),
    [
        ((1, 3, 6, 6), 1, "(B, 3, 6, 8)"),
        ((1, 1, 6, 8), 1, "cannot be completed"),
        ((3, 6, 8), 1, "cannot be completed"),
        ((1, 3, 6, 8), 4, "rows 4"),
        ((1, 3, 6, 8), -1, "rows -1"),
        ((2, 3, 6, 8), 0, "2 images and 1 labels"),
        ((2, 3, 6, 8), 3, "2 images and 1 labels"),
        ((1, 3, 3, 8), None, "(B, 3, k * 2, 8)"),
        ((1, 3, 8, 8), None, "cannot be completed"),
        ((3, 2, 8), None, "cannot be completed"),
        ((2, 3, 2, 8), None, "2 images and 1 labels"),
    ],
)
def test_bad_completions_are_refused(shape, rows, words):
    """Pass the images as ``keep`` of a stream if ``rows`` is None."""
    sampler, given = Sampler(random_model()), torch.zeros(shape)
    if rows is None:
        refused(lambda: next(sampler.stream([0], [0], keep=given)), words)
    else:
        refused(lambda: sampler.complete(given, rows, [0], [0]), words)


def test_stream_begins_with_pixels_of_any_float():
    sampler, keep = Sampler(random_model()), torch.zeros(1, 3, 2, 8, dtype=torch.float64)
    (*_, whole) = sampler.stream([0], [0], keep=keep)
    assert whole.dtype is torch.float32
    assert not whole[:, :, :2].any()
    refused(lambda: next(sampler.stream([0], [0], keep=keep.byte())), "uint8")


def test_old_settings_mean_what_they_meant():
    old = {"guidance": 1.5, "schedule": "constant", "solver": "heun", "steps": 4, "temperature": 1.0}
    config = from_dict(SamplingConfig, old)
    assert config == SamplingConfig(guidance=1.5, solver=Solver.HEUN, steps=4)
    assert torch.equal(solvers.time_grid(config.time_grid, 7, config.shift), torch.linspace(0, 1, 8))
    written = replace(SETTINGS["free"], guidance_interval=(0.2, 0.7), times=(0.0, 1.0))
    assert from_dict(SamplingConfig, json.loads(json.dumps(to_dict(written)))) == written


@pytest.mark.parametrize(
    ("name", "tensors", "weights", "loss", "square"),
    [("tiny", 73, 454.6327169, 3.968101, 0.62858862), ("tiny:jit", 73, 424.4218657, 0.9038778, 0.0)],
)
def test_class_conditional_models_are_what_they_were(name, tensors, weights, loss, square):
    """Golden numbers of initial weights, a loss and images: published weights and seeds must keep their meaning."""
    run, keys = recipe(name), noise.keys(7, torch.arange(4))
    model = build_model(run.model, 0)
    assert len(model.state_dict()) == tensors
    assert sum(p.detach().double().sum().item() for p in model.parameters()) == pytest.approx(weights, rel=1e-8)
    images, objective = noise.uniform(keys, 1, 8, 8) * 2 - 1, replace(run.train.objective, class_dropout=0.5)
    found = training_losses(model, images, torch.arange(4), keys, objective, run.train.rollout)
    assert found.total.item() == pytest.approx(loss, rel=1e-5)
    drawn = Sampler(model, guidance=2.0).sample([0, 3], [1, 2])
    assert drawn.double().square().mean().item() == pytest.approx(square, rel=1e-4, abs=1e-12)
