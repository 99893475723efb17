"""``examples/pra_in_one_file.py`` against the package, with the same weights and the same noise."""

import re

import pytest
import torch
from PIL import Image
from support.models import LEARNED, batch, random_model
from support.pages import ROOT, script

import pra
from pra.config import ObjectiveConfig, Parallel
from pra.method import flow, noise
from pra.method.noise import Purpose
from pra.method.objectives import training_losses
from pra.sampling import Sampler

PATH = ROOT / "examples" / "pra_in_one_file.py"
one_file = script(PATH)

SIZES = {"digits": pra.recipe("digits:faithful").model, "colours": LEARNED}
"""The recipe, and a model whose other options are on: colours, an encoder that sees ``h``, two projections."""

NAMES = (
    (r"^condition\.embedding", "class_embedding"),
    (r"^backbone\.(patch_in|next_position)", r"\1"),
    (r"^codec\.encoder\.patch_in", "encoder_in"),
    (r"^codec\.encoder\.condition_in", "encoder_condition"),
    (r"^codec\.encoder\.blocks\.(\d+)\.(norm|mlp)", r"encoder_\2s.\1"),
    (r"^codec\.encoder\.norm", "encoder_norms.last"),
    (r"^codec\.decoder\.state_in", "decoder_in"),
    (r"^codec\.(encoder|decoder)\.out", r"\1_out"),
    (r"^codec\.decoder", "decoder"),
    (r"\.transformer\.", "."),
    (r"\.attention\.", "."),
    (r"^head\.blocks\.(\d+)\.(norm|mlp)", r"head.\2s.\1"),
)
"""Names of weights in the package, and what the example calls them."""


def name_of(name, model):
    for known, here in NAMES:
        name = re.sub(known, here, name)
    return name.replace("last", str(len(model.codec.encoder.blocks)))


@pytest.fixture(params=SIZES)
def models(request):
    """A model of the package, and the example's with the same weights."""
    model = random_model(SIZES[request.param])
    size, codec = model.config, model.config.codec
    config = one_file.Config(
        channels=size.channels,
        patch=size.patch_size,
        grid=size.grid,
        classes=size.num_classes,
        class_tokens=size.class_tokens,
        backbone=(size.backbone.depth, size.backbone.width, size.backbone.heads),
        head=(size.head.depth, size.head.width, size.head.modulations),
        encoder=(codec.encoder.depth, codec.encoder.width),
        decoder=(codec.decoder.depth, codec.decoder.width, codec.decoder.heads),
        state_dim=codec.state_dim,
        encoder_sees_h=codec.encoder.sees_condition,
        t_min=0.3,
        class_dropout=0.5,
    )
    own = one_file.PRA(config)
    own.load_state_dict({name_of(name, model): weight for name, weight in model.state_dict().items()})
    return model, own


def same_noise(config, keys):
    """The numbers that the package draws."""
    n, d, draws = config.grid[0] * config.grid[1], config.state_dim, config.noise_draws
    key = {purpose: noise.fold(keys, purpose) for purpose in Purpose}
    return (
        noise.uniform(key[Purpose.CLASS_DROPOUT]) < config.class_dropout,
        flow.uniform_times(key[Purpose.ROLLOUT_TIME], n - 1, 1, low=config.t_min),
        noise.normal(key[Purpose.ROLLOUT_NOISE], n - 1, d),
        flow.logit_normal_times(key[Purpose.FLOW_TIME], draws, n),
        noise.normal(key[Purpose.FLOW_NOISE], draws, n, d),
    )


def test_one_file_losses_and_gradients_equal_the_package(models):
    model, own = models
    images, labels, keys = batch(model.config, 6)
    given = same_noise(own.config, keys)
    drawn = one_file.draw_noise(own.config, 6)
    assert [(each.shape, each.dtype) for each in given] == [(each.shape, each.dtype) for each in drawn]
    assert 0 < given[0].sum() < 6
    found = one_file.losses(own, images, labels, given)
    expected = training_losses(model, images, labels, keys, ObjectiveConfig(class_dropout=0.5), Parallel(t_min=0.3))
    torch.testing.assert_close(found, {"total": expected.total, **expected.terms}, rtol=1e-5, atol=1e-6)
    found["total"].backward()
    expected.total.backward()
    gradients = {name: weight.grad for name, weight in own.named_parameters()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients[name_of(name, model)], weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("guidance", "steps"), [(1.5, 3), (1.0, 2)])
def test_one_file_samples_equal_the_package(models, guidance, steps):
    model, own = models
    labels, seeds = torch.arange(3), torch.arange(3)
    start = noise.normal(
        noise.fold(noise.keys(0, seeds), Purpose.SAMPLE_START), model.config.num_patches, own.config.state_dim
    )
    images = one_file.sample(own, labels, start, guidance, steps)
    expected = Sampler(model, guidance=guidance, steps=steps).sample(labels, seeds)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_one_file_is_short_and_needs_torch_alone():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 300
    modules = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert modules == {"copy", "math", "pathlib", "sys", "torch", "typing"}


def test_one_file_draws_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="has the digits")
    monkeypatch.setattr(one_file.train, "__defaults__", (2, 8))
    with torch.random.fork_rng():
        one_file.main(tmp_path / "digits.pgm")
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:2]] == [["step", "0"], ["step", "1"]]
    with Image.open(tmp_path / "digits.pgm") as picture:
        assert (picture.size, picture.mode) == ((320, 400), "L")
