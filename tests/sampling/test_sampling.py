"""The sampler: equal to the formulas, one image per seed, streaming and completion."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from naive import sample_without_caches
from support.models import ALL, LEARNED, PIXEL, batch, random_jit, random_model

from pra import PraError, Sampler
from pra.config import GuidanceSchedule, Precision, SamplingConfig, Solver, TimeGrid
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


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ALL)
def test_equal_to_the_formulas_without_caches(name, settings):
    """Cache parity through the whole sampler, guidance included."""
    model = random_model(ALL[name])
    images = Sampler(model, SETTINGS[settings]).sample(LABELS, SEEDS)
    assert images.shape == (4, 3, 6, 8)
    assert images.abs().max() <= 1
    close(images, sample_without_caches(model, SETTINGS[settings], LABELS, SEEDS))


@pytest.mark.parametrize("settings", ["guided", "sde"])
def test_an_image_is_a_function_of_label_and_seed(settings):
    """Not of the batch, nor of its order."""
    sampler = Sampler(random_model(), SETTINGS[settings])
    together = sampler.sample(LABELS, SEEDS)
    order = [2, 0, 3, 1]
    close(sampler.sample([LABELS[i] for i in order], [SEEDS[i] for i in order]), together[order])
    for i in range(4):
        close(sampler.sample(LABELS[i : i + 1], SEEDS[i : i + 1]), together[i : i + 1])


def test_seeds_and_labels_matter_and_global_randomness_does_not():
    sampler = Sampler(random_model(), SETTINGS["sde"])
    torch.manual_seed(0)
    images = sampler.sample([1, 1, 2], [5, 6, 5])
    torch.manual_seed(1)
    assert torch.equal(images, sampler.sample([1, 1, 2], [5, 6, 5]))
    for a, b in itertools.combinations(images, 2):
        assert (a - b).abs().max() > 0.01


def test_guidance_of_one_is_no_guidance_and_runs_one_stream():
    model = random_model()
    rows = []
    model.head.register_forward_pre_hook(lambda head, inputs: rows.append(inputs[2].shape[:2]))
    Sampler(model, SamplingConfig(guidance=1.0)).sample(LABELS, SEEDS)
    assert set(rows) == {(1, 4)}
    rows.clear()
    Sampler(model, SamplingConfig(guidance=2.0)).sample(LABELS, SEEDS)
    assert set(rows) == {(2, 4)}


def test_linear_guidance_rises_from_one_to_the_scale():
    scales = [scale_at(SETTINGS["linear"], i, 12) for i in range(12)]
    assert scales[0] == 1.0
    assert scales[-1] == 3.0
    assert all(b - a == pytest.approx(2 / 11) for a, b in itertools.pairwise(scales))
    assert scale_at(SETTINGS["guided"], 0, 12) == 3.0


def test_temperature_zero_leaves_nothing_to_chance():
    sampler = Sampler(random_model(), SamplingConfig(temperature=0.0))
    close(*sampler.sample([3, 3], [1, 2]).split(1))


def test_stream_grows_row_by_row_into_the_sample():
    sampler = Sampler(random_model())
    parts = list(sampler.stream(LABELS, SEEDS))
    assert [p.shape[2] for p in parts] == [2, 4, 6]
    whole = sampler.sample(LABELS, SEEDS)
    for part in parts:
        assert torch.equal(part, whole[:, :, : part.shape[2]])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_completion_keeps_true_pixels_exactly(name, rows):
    model = random_model(ALL[name])
    images, _, _ = batch(model.config, 4)
    sampler = Sampler(model, SETTINGS["guided"])
    completed = sampler.complete(images, rows, LABELS, SEEDS)
    assert completed.shape == images.shape
    assert torch.equal(completed[:, :, : 2 * rows], images[:, :, : 2 * rows])
    if rows == 0:
        close(completed, sampler.sample(LABELS, SEEDS))
    if rows < 3:
        assert (completed[:, :, 2 * rows :] - images[:, :, 2 * rows :]).abs().max() > 0.01
        other = images.clone()
        other[:, :, 2 * rows :] = 0.0  # what is not kept does not matter
        assert torch.equal(sampler.complete(other, rows, LABELS, SEEDS), completed)


def test_completion_continues_what_was_kept():
    """Kept pixels reach the continuation through the backbone and, as states, through the decoder."""
    model = random_model(LEARNED)
    images, _, _ = batch(model.config, 1)
    sampler = Sampler(model)
    one, two = (sampler.complete(x, 1, [0], [0])[:, :, 2:] for x in (images, -images))
    assert (one - two).abs().max() > 0.01


def test_completing_a_sample_with_its_own_seed_gives_it_back():
    """With the identity codec the states of kept pixels are the pixels: nothing differs from plain sampling."""
    sampler = Sampler(random_model(PIXEL), SETTINGS["guided"])
    whole = sampler.sample(LABELS, SEEDS)
    close(sampler.complete(whole, 2, LABELS, SEEDS), whole)


def test_images_that_are_not_finite_are_refused_once_they_are_finished():
    sampler = Sampler(random_model(), SamplingConfig(temperature=1e300))
    parts = sampler.stream([0, 1], [0, 1])
    assert [next(parts).shape[2] for _ in range(2)] == [2, 4]
    with pytest.raises(PraError, match=r"2 of 2 images are not finite numbers; try temperature .*\(now 1e\+300\)"):
        next(parts)
    with pytest.raises(PraError, match="1 of 1 images are not finite numbers"):
        Sampler(random_jit(), SamplingConfig(temperature=1e300)).sample([0], [0])


def test_unconditional_models_have_one_class():
    model = random_model(num_classes=1)
    assert Sampler(model, SETTINGS["guided"]).sample([0, 0], [1, 2]).shape == (2, 3, 6, 8)


def test_the_model_brings_its_own_settings():
    model = random_model()
    model.sampling = SETTINGS["sde"]
    assert torch.equal(Sampler(model).sample([1], [2]), Sampler(model, SETTINGS["sde"]).sample([1], [2]))


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        ([6], [0], "label 6 is out of range: this model's classes are 0 to 4"),
        ([-1], [0], "label -1 is out of range"),
        ([0, 1], [0], "2 labels and 1 seeds"),
        ([], [], "0 labels"),
        ([0.7], [0], "labels must be whole numbers"),
        (1.5, 0, r"labels must be whole numbers of 64 bits or names of classes, got \[1.5\]"),
        ("cta", 0, "no class 'cta'; did you mean 'cat'?"),
        (["cat", 9], [0, 1], "label 9 is out of range"),
        ("cat", [0, 1], "1 labels and 2 seeds"),
        ([0], ["0"], "seeds must be whole numbers"),
        (torch.rand(40, 40), [0], "labels must be whole numbers"),
        ([0], [2**64], "seeds must be whole numbers of 64 bits"),
    ],
)
def test_bad_requests(labels, seeds, message):
    model = random_model()
    model.classes = ("ant", "bee", "cat", "dog", "eel")
    with pytest.raises(PraError, match=message) as raised:
        Sampler(model).sample(labels, seeds)
    assert "\n" not in str(raised.value)


def test_labels_may_be_names_and_one_alone_is_a_batch_of_one():
    model = random_model()
    model.classes = ("ant", "bee", "cat", "dog", "eel")
    sampler = Sampler(model)
    expected = sampler.sample([2, 4, 5], [7, 8, 9])
    for labels in (["cat", "eel", 5], np.array([2, 4, 5]), torch.tensor([2, 4, 5]), ("cat", 4, 5)):
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
    ("changes", "message"),
    [
        ({"precision": "bfloat"}, "precision: 'bfloat' is unknown; did you mean 'bfloat16'?"),
        ({"guidence": 2.0}, "guidence is unknown; did you mean 'guidance'?"),
        ({"guidance": "much"}, "guidance: expected float, got 'much'"),
        ({"guidance": -1.0}, "guidance"),
        ({"solver": "huen"}, "'huen' is unknown; did you mean 'heun'?"),
        ({"times": 3}, "times"),
        ({"steps": 2.5}, "steps: expected int, got 2.5"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(PraError, match=message.replace("?", r"\?")) as raised:
        Sampler(random_model(), **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [
        ((1, 3, 6, 6), 1, r"\(1, 3, 6, 6\) cannot be completed.*\(B, 3, 6, 8\)"),
        ((1, 1, 6, 8), 1, "cannot be completed"),
        ((3, 6, 8), 1, "cannot be completed"),
        ((1, 3, 6, 8), 4, "rows 4 is out of range.*keep 0 to 3"),
        ((1, 3, 6, 8), -1, "rows -1 is out of range"),
    ],
)
def test_bad_completions(shape, rows, message):
    with pytest.raises(PraError, match=message):
        Sampler(random_model()).complete(torch.zeros(shape), rows, [0], [0])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.zeros(1, 3, 3, 8), r"\(1, 3, 3, 8\) cannot be completed.*\(B, 3, k \* 2, 8\)"),
        (torch.zeros(1, 3, 8, 8), "cannot be completed"),
        (torch.zeros(3, 2, 8), "cannot be completed"),
        (torch.zeros(1, 3, 2, 8, dtype=torch.uint8), "uint8 cannot be completed"),
        (torch.zeros(2, 3, 2, 8), "2 images and 1 labels"),
    ],
)
def test_a_stream_begins_with_whole_rows_of_pixels(keep, message):
    sampler = Sampler(random_model())
    with pytest.raises(PraError, match=message):
        next(sampler.stream([0], [0], keep=keep))
    (*_, whole) = sampler.stream([0], [0], keep=torch.zeros(1, 3, 2, 8, dtype=torch.float64))
    assert whole.dtype is torch.float32
    assert not whole[:, :, :2].any()


def test_completion_needs_a_label_per_image():
    for rows in (0, 1, 3):
        with pytest.raises(PraError, match="2 images and 3 labels"):
            Sampler(random_model()).complete(torch.zeros(2, 3, 6, 8), rows, [0, 0, 0], [0, 0, 0])


def test_integer_pixels_are_not_taken_for_floats():
    with pytest.raises(PraError, match="uint8 cannot be completed"):
        Sampler(random_model()).complete(torch.zeros(1, 3, 6, 8, dtype=torch.uint8), 1, [0], [0])


def test_settings_are_checked():
    for change in ({"steps": 0}, {"guidance": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(PraError, match=next(iter(change))):
            replace(SamplingConfig(), **change)


@pytest.mark.gpu
def test_the_gpu_draws_the_same_image():
    model = random_model()
    on_cpu = Sampler(model, SETTINGS["guided"]).sample(LABELS, SEEDS)
    on_gpu = Sampler(model.cuda(), SETTINGS["guided"], Precision.FLOAT32).sample(LABELS, SEEDS)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_stays_close(name):
    """The arithmetic of CUDA's default, here on the CPU."""
    model = random_model(ALL[name])
    exact = Sampler(model, SETTINGS["guided"]).sample(LABELS, SEEDS)
    rounded = Sampler(model, SETTINGS["guided"], Precision.BFLOAT16).sample(LABELS, SEEDS)
    assert rounded.dtype is torch.float32
    assert (rounded - exact).abs().mean() < 0.02


def test_labels_may_be_an_iterator():
    sampler = Sampler(random_model(), SETTINGS["guided"])
    assert torch.equal(sampler.sample(iter(LABELS), iter(SEEDS)), sampler.sample(LABELS, SEEDS))
