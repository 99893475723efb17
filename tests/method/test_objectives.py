"""The losses: where each gradient may go, what each target is."""

from dataclasses import replace

import pytest
import torch
from support.models import ALL, JITS, LEARNED, batch, random_jit, random_model

from pra import config
from pra.config import ObjectiveConfig, PixelLoss
from pra.method import noise, rollout
from pra.method.objectives import drop_labels, mask_encoder, normalise_patches, training_losses
from pra.models.head import velocity_from_data

ROLLOUTS = [config.Clean(), config.Noised(sigma=0.1), config.Reconstructed(), config.Parallel(), config.Exact(steps=1)]


def computed(model, rollout=config.Parallel(), perceptual=None, **objective):  # noqa: B008  (frozen)
    images, labels, keys = batch(model.config)
    return training_losses(model, images, labels, keys, ObjectiveConfig(**objective), rollout, perceptual)


def distance(reconstruction, image):
    """A distance in place of LPIPS."""
    assert reconstruction.shape == image.shape
    return 3 * (reconstruction - image).abs().mean((1, 2, 3))


def reached(model, loss):
    """The parts of the model that a loss has a gradient in."""
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    return {".".join(name.split(".")[: 2 if name.startswith("codec") else 1]) for name in names}


def untrained(model):
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("rollout", ROLLOUTS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", ["learned", "encoder-without-h"])
def test_gradients_go_where_they_should(name, rollout):
    model = random_model(ALL[name])
    losses = computed(model, rollout, distance, perceptual_weight=0.5)
    assert reached(model, losses.terms["flow"]) == {"condition", "backbone", "head"}
    assert reached(model, losses.terms["auxiliary"]) == {"condition", "backbone", "auxiliary"}
    for codec in ("pixel", "perceptual"):
        assert reached(model, losses.terms[codec]) == {"codec.encoder", "codec.decoder"}
    reached(model, losses.total)
    assert untrained(model) == []


def test_perturbed_term_is_of_the_ar_inputs():
    model, how = random_model(), config.Parallel(t_min=0.3)
    losses, without = computed(model, how, perturbed_weight=0.5), computed(model, how)
    assert reached(model, losses.terms["perturbed"]) == {"codec.encoder", "codec.decoder"}
    assert "perturbed" not in without.terms | computed(model, config.Clean(), perturbed_weight=0.5).terms
    torch.testing.assert_close(losses.terms["flow"], without.terms["flow"])
    torch.testing.assert_close(losses.total, without.total + 0.5 * losses.terms["perturbed"])
    images, labels, keys = batch(model.config)
    patches = model.patchify(images)
    z = model.codec.encode(patches, model.clean_conditions(labels, patches))
    decoded = model.codec.decode(rollout.perturbed(z, 0.3, keys))
    torch.testing.assert_close(losses.terms["perturbed"], (decoded - patches).square().mean())


@pytest.mark.parametrize("hidden", config.EncoderInput)
def test_encoder_masking_hides_its_share_of_one_input(hidden):
    patches, conditions = torch.ones(50, 40, 3), torch.ones(50, 40, 5)
    keys = noise.keys(0, torch.arange(50))
    how = ObjectiveConfig(encoder_masking=0.25, encoder_masks=hidden)
    masked, whole = mask_encoder(patches, conditions, how, keys)
    if hidden is config.EncoderInput.CONDITION:
        masked, whole = whole, masked
        assert mask_encoder(patches, None, how, keys) == (patches, None)
    assert whole.all()
    assert torch.equal(masked, masked[..., :1].expand_as(masked)), "a token is hidden as a whole"
    assert masked.mean().item() == pytest.approx(0.75, abs=0.03)
    assert mask_encoder(patches, conditions, ObjectiveConfig(), keys) == (patches, conditions)


def test_codec_learns_from_perturbed_states_alone():
    losses = computed(random_model(), pixel_weight=0.0, perturbed_weight=1.0, auxiliary_weight=0.0)
    torch.testing.assert_close(losses.total, losses.terms["perturbed"] + losses.terms["flow"])


def test_terms_without_ar_pass_are_the_codecs():
    model = random_model()
    losses = computed(model, None)
    assert reached(model, losses.total) == {"codec.encoder", "codec.decoder"}
    assert losses.total == losses.terms["pixel"] == computed(model).terms["pixel"]
    assert [*losses.terms] == ["pixel"]
    assert [*computed(model, None, distance, perceptual_weight=0.5).terms] == ["pixel", "perceptual"]
    seen = computed(model, None, lambda _, image: 3.0 * torch.arange(len(image)), perceptual_weight=0.5)
    assert (seen.terms["perceptual"], seen.terms["pixel"]) == (3.0, losses.total)
    torch.testing.assert_close(seen.total, losses.total + 1.5)
    assert "perceptual" not in computed(model, perceptual=lambda *_: pytest.fail("it has no weight")).terms


@pytest.mark.parametrize("name", ["pixel-v", "pixel-x"])
def test_identity_codec_has_nothing_to_reconstruct(name):
    model = random_model(ALL[name])
    losses = computed(model, config.Clean(), distance, perceptual_weight=0.5, auxiliary_weight=0.37)
    assert [*losses.terms] == ["flow", "auxiliary"]
    assert losses.total == losses.terms["flow"] + 0.37 * losses.terms["auxiliary"]
    assert reached(model, losses.total) == {"condition", "backbone", "head", "auxiliary"}


@pytest.mark.parametrize(("auxiliary", "perceptual"), [(0.0, 0.3), (0.1, 0.0), (0.37, 0.3)])
def test_total_is_the_weighted_sum_bitwise(auxiliary, perceptual):
    """Rounding depends on the order of additions: runs resume with the losses that they began with."""
    model = random_model(replace(LEARNED, head=replace(LEARNED.head, shortcut=True)))
    losses = computed(model, perceptual=distance, auxiliary_weight=auxiliary, perceptual_weight=perceptual)
    terms = losses.terms
    codec = terms["pixel"] + perceptual * terms["perceptual"] if perceptual else terms["pixel"]
    assert losses.total == terms["flow"] + codec + auxiliary * terms["auxiliary"] + terms["shortcut"]
    names = ["pixel", *["perceptual"] * bool(perceptual), "flow", "auxiliary", "shortcut"]
    assert [*terms] == names
    measured = losses.measured()
    assert [*measured] == ["total", *names, "state_std"]
    assert not any(value.requires_grad for value in measured.values())


def test_flow_loss_of_the_zero_field_is_the_target():
    """E|z - eps|^2 per dimension is 1 + 1 for normalised states and unit noise."""
    model = random_model()
    with torch.no_grad():
        model.head.out.weight.zero_()
        model.head.out.bias.zero_()
    assert computed(model, noise_draws=200).terms["flow"].item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("name", ["pixel-v", "pixel-x"])
def test_perfect_head_has_no_flow_loss(name, monkeypatch):
    """Both predictions are held against the same velocity: knowing z exactly gives zero."""
    model = random_model(ALL[name])
    z = model.patchify(batch(model.config)[0]).unsqueeze(1)

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


@pytest.mark.parametrize("make", [random_model, random_jit])
def test_loss_of_a_batch_is_the_mean_of_its_samples(make):
    """Nothing is drawn per batch."""
    model = make()
    given = batch(model.config)
    whole, *parts = (
        training_losses(model, *(tensor[rows] for tensor in given), ObjectiveConfig(), config.Parallel()).total
        for rows in (slice(3), slice(0, 1), slice(1, 2), slice(2, 3))
    )
    torch.testing.assert_close(whole, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)


def test_labels_are_dropped_at_the_stated_rate():
    model, labels, keys = random_model(), torch.zeros(20_000, dtype=torch.int64), noise.keys(0, torch.arange(20_000))
    assert (drop_labels(model, labels, 0.1, keys) == 5).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(drop_labels(model, labels, 0.0, keys), labels)
    assert (drop_labels(model, labels, 1.0, keys) == 5).all()


def test_normalised_patches_have_unit_variance():
    patches = normalise_patches(torch.randn(2, 3, 48) * 5 + 2)
    assert patches.mean(dim=-1).abs().max() < 1e-5
    torch.testing.assert_close(patches.std(dim=-1), torch.ones(2, 3), atol=1e-3, rtol=0)
    assert torch.equal(normalise_patches(torch.ones(1, 1, 4)), torch.zeros(1, 1, 4))  # a flat patch: no division by 0
    assert torch.equal(normalise_patches(torch.randn(2, 3, 1)), torch.zeros(2, 3, 1))
    model = random_model(replace(ALL["pixel-v"], image_size=(4, 4), patch_size=1, channels=1))
    losses = computed(model, config.Clean())
    assert losses.total.isfinite()
    assert losses.terms["auxiliary"].isfinite()
    assert "head" in reached(model, losses.total)


def test_state_std_shows_collapse():
    model = random_model()
    assert computed(model).state_std > 0.02
    with torch.no_grad():
        model.codec.encoder.out.weight.zero_()
        model.codec.encoder.out.bias.copy_(torch.arange(5.0))
    assert computed(model).state_std < 1e-5


LOWERED = [(ALL["learned"], rollout) for rollout in ROLLOUTS] + [(ALL["pixel-x"], ROLLOUTS[-1])]


@pytest.mark.parametrize(("size", "rollout"), LOWERED + [(size, config.Clean()) for size in JITS.values()])
def test_bfloat16_losses_stay_close(size, rollout):
    """The arithmetic of CUDA's default, here on the CPU; the losses themselves are float32."""
    model = random_jit(size) if size in JITS.values() else random_model(size)
    exact = computed(model, rollout)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = computed(model, rollout)
    assert rounded.terms.keys() == exact.terms.keys()
    for term, value in rounded.terms.items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, exact.terms[term], rtol=0.05, atol=0.02)
    # The passes without gradient must not leave their casts of the weights to the pass with one.
    rounded.total.backward()  # type: ignore[no-untyped-call]
    assert untrained(model) == []
