"""The losses: where each gradient may go, what each target is."""

from dataclasses import replace

import pytest
import torch
from support.models import ALL, LEARNED, batch, random_model

import pra
from pra import config
from pra.config import ObjectiveConfig, PixelLoss
from pra.method import noise
from pra.method.objectives import drop_labels, losses_of, normalise_patches, training_losses
from pra.models.head import velocity_from_data

ROLLOUTS = [
    config.Clean(),
    config.Noised(sigma=0.1),
    config.Reconstructed(),
    config.Parallel(),
    config.Exact(steps=1),
]


def computed(model, rollout=config.Parallel(), perceptual=None, **objective):  # noqa: B008  frozen
    images, labels, keys = batch(model.config)
    return training_losses(model, images, labels, keys, ObjectiveConfig(**objective), rollout, perceptual)


def distance(reconstruction, image):
    """In place of LPIPS."""
    return 3 * (reconstruction - image).abs().mean((1, 2, 3))


def reached(model, loss):
    """The parts of the model that a loss has a gradient in."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    return {".".join(name.split(".")[: 2 if name.startswith("codec") else 1]) for name in names}


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", ["learned", "encoder-without-h"])
def test_gradients_go_where_they_should(name, rollout):
    model = random_model(ALL[name])
    terms = computed(model, rollout, distance, perceptual_weight=0.5).terms
    assert reached(model, terms["flow"]) == {"condition", "backbone", "head"}
    assert reached(model, terms["auxiliary"]) == {"condition", "backbone", "auxiliary"}
    for codec in ("pixel", "perceptual"):
        assert reached(model, terms[codec]) == {"codec.encoder", "codec.decoder"}


def test_terms_without_ar_pass_are_the_codecs():
    model = random_model()
    losses = computed(model, None)
    assert reached(model, losses.total) == {"codec.encoder", "codec.decoder"}
    assert losses.total == losses.terms["pixel"] == computed(model).terms["pixel"]
    assert [*losses.terms] == ["pixel"]
    assert [*computed(model, None, distance, perceptual_weight=0.5).terms] == ["pixel", "perceptual"]


@pytest.mark.parametrize("name", ["pixel-v", "pixel-x"])
def test_identity_codec_has_nothing_to_reconstruct(name):
    model = random_model(ALL[name])
    losses = computed(model, config.Clean(), distance, perceptual_weight=0.5)
    assert [*losses.terms] == ["flow", "auxiliary"]
    assert reached(model, losses.total) == {"condition", "backbone", "head", "auxiliary"}


def test_every_parameter_is_trained():
    model = random_model()
    computed(model).total.backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untrained == []


@pytest.mark.parametrize("perceptual", [0.0, 0.3])
@pytest.mark.parametrize("auxiliary", [0.0, 0.1, 0.37])
def test_total_is_the_weighted_sum_bitwise(auxiliary, perceptual):
    """In this order of additions, on which rounding depends: runs go on with the losses that they began with."""
    model = random_model(replace(LEARNED, head=replace(LEARNED.head, shortcut=True)))
    weights = {"auxiliary_weight": auxiliary, "perceptual_weight": perceptual}
    total, terms, _ = computed(model, config.Parallel(), distance, **weights)
    codec = terms["pixel"]
    if perceptual:
        codec = codec + perceptual * terms["perceptual"]
    assert total == terms["flow"] + codec + auxiliary * terms["auxiliary"] + terms["shortcut"]
    assert [*terms] == ["pixel", *["perceptual"] * bool(perceptual), "flow", "auxiliary", "shortcut"]


@pytest.mark.parametrize("name", ["pixel-v", "pixel-x"])
def test_total_without_codec_is_the_weighted_sum_bitwise(name):
    total, terms, _ = computed(random_model(ALL[name]), config.Clean(), auxiliary_weight=0.37)
    assert total == terms["flow"] + 0.37 * terms["auxiliary"]


def test_measured_values_have_names_and_no_gradient():
    losses = computed(random_model())
    measured = losses.measured()
    assert [*measured] == ["total", "pixel", "flow", "auxiliary", "state_std"]
    assert not any(value.requires_grad for value in measured.values())
    assert measured["total"] == losses.total


def test_model_class_brings_its_own_losses():
    class Other(pra.PRA):
        pass

    other = Other(LEARNED)
    assert losses_of(other) is losses_of(random_model())  # inherited
    expected = object()
    training_losses.register(Other, lambda model, *_: expected)
    assert computed(other) is losses_of(other)(other) is expected
    assert losses_of(random_model()) is not losses_of(other)


def test_losses_of_unknown_class_are_refused():
    with pytest.raises(TypeError, match=r"Linear has no losses: register a function with training_losses\.register"):
        training_losses(torch.nn.Linear(1, 1), *[None] * 5)


def test_flow_loss_of_the_zero_field_is_the_energy_of_the_target():
    """E|z - eps|^2 per dimension is 1 + 1 for normalised states and unit noise."""
    model = random_model()
    with torch.no_grad():
        model.head.out.weight.zero_()
        model.head.out.bias.zero_()
    assert computed(model, noise_draws=200).terms["flow"].item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("name", ["pixel-v", "pixel-x"])
def test_a_perfect_head_has_no_flow_loss(name, monkeypatch):
    """Both predictions are held against the same velocity: knowing z exactly gives zero."""
    model = random_model(ALL[name])
    images, _, _ = batch(model.config)
    z = model.patchify(images).unsqueeze(1)

    def perfect(z_t, t, condition):
        t = t.unsqueeze(-1)
        if model.head.prediction is config.Prediction.DATA:
            return velocity_from_data(z, z_t, t)
        return (z - z_t) / (1 - t)

    monkeypatch.setattr(model.head, "forward", perfect)
    assert computed(model, config.Clean()).terms["flow"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", list(PixelLoss))
def test_pixel_term_is_the_error_of_the_pixels(kind):
    model = random_model(ALL["encoder-without-h"])
    images, labels, _ = batch(model.config)
    # Keeps the decoder inside [-1, 1], where reconstruct() does not clamp.
    with torch.no_grad():
        model.codec.decoder.out.weight.mul_(0.1)
    error = model.reconstruct(images, labels) - images
    expected = error.abs().mean() if kind is PixelLoss.L1 else error.square().mean()
    torch.testing.assert_close(computed(model, pixel_loss=kind).terms["pixel"], expected)


def test_perceptual_term_is_the_mean_distance():
    model = random_model()
    images, _, _ = batch(model.config)

    def constant(reconstruction, image):
        assert reconstruction.shape == image.shape == images.shape
        return torch.arange(len(image)) * 3.0

    plain = computed(model, config.Clean())
    perceptual = computed(model, config.Clean(), constant, perceptual_weight=0.5)
    assert perceptual.terms["perceptual"] == 3.0
    assert perceptual.terms["pixel"] == plain.terms["pixel"]
    torch.testing.assert_close(perceptual.total, plain.total + 1.5)


def test_perceptual_term_without_weight_is_not_computed():
    def never(*_):
        raise AssertionError

    assert "perceptual" not in computed(random_model(), perceptual=never, perceptual_weight=0.0).terms


def test_a_sample_has_its_own_randomness():
    """The loss of a batch is the mean of its samples' losses: nothing is drawn per batch."""
    model = random_model()
    images, labels, keys = batch(model.config)
    objective = ObjectiveConfig()
    whole = training_losses(model, images, labels, keys, objective, config.Parallel())
    parts = [
        training_losses(model, images[i : i + 1], labels[i : i + 1], keys[i : i + 1], objective, config.Parallel())
        for i in range(3)
    ]
    torch.testing.assert_close(whole.total, torch.stack([p.total for p in parts]).mean(), atol=1e-5, rtol=1e-5)


def test_labels_are_dropped_at_the_stated_rate():
    model, labels, keys = random_model(), torch.zeros(20_000, dtype=torch.int64), noise.keys(0, torch.arange(20_000))
    assert (drop_labels(model, labels, 0.1, keys) == 5).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(drop_labels(model, labels, 0.0, keys), labels)
    assert (drop_labels(model, labels, 1.0, keys) == 5).all()


def test_normalised_patches():
    patches = normalise_patches(torch.randn(2, 3, 48) * 5 + 2)
    assert patches.mean(dim=-1).abs().max() < 1e-5
    torch.testing.assert_close(patches.std(dim=-1), torch.ones(2, 3), atol=1e-3, rtol=0)
    assert torch.equal(normalise_patches(torch.ones(1, 1, 4)), torch.zeros(1, 1, 4))  # a flat patch: no division by 0


def test_patches_of_one_number_have_no_part_in_the_auxiliary_loss_and_break_none():
    assert torch.equal(normalise_patches(torch.randn(2, 3, 1)), torch.zeros(2, 3, 1))
    model = random_model(replace(ALL["pixel-v"], image_size=(4, 4), patch_size=1, channels=1))
    losses = computed(model, config.Clean())
    assert losses.total.isfinite()
    assert losses.terms["auxiliary"].isfinite()
    assert "head" in reached(model, losses.total)


def test_state_std_shows_collapse():
    healthy = random_model(replace(LEARNED, codec=replace(LEARNED.codec, state_dim=5)))
    assert computed(healthy).state_std > 0.02
    with torch.no_grad():
        healthy.codec.encoder.out.weight.zero_()
        healthy.codec.encoder.out.bias.copy_(torch.arange(5.0))
    assert computed(healthy).state_std < 1e-5


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", ["learned", "pixel-x"])
def test_bfloat16_stays_close(name, rollout):
    """The arithmetic of CUDA's default, here on the CPU; the losses themselves are float32."""
    model = random_model(ALL[name])
    exact = computed(model, rollout)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = computed(model, rollout)
    assert rounded.terms.keys() == exact.terms.keys()
    for term, value in rounded.terms.items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, exact.terms[term], rtol=0.05, atol=0.02)


def test_bfloat16_trains_every_parameter():
    """The passes without gradient must not leave their casts of the weights to the pass with one."""
    model = random_model()
    with torch.autocast("cpu", torch.bfloat16):
        losses = computed(model, config.Exact(steps=1))
    losses.total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
