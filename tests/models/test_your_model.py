"""The sampler runs the model that it is given: hooks, wrappers and replaced parts show in the images."""

import inspect
import logging

import pytest
import torch
from naive import sample_without_caches
from support.engines import by_modules
from support.models import ALL, random_model
from torch import nn

from pra import Sampler, cli, save
from pra.config import Precision, SamplingConfig
from pra.models.condition import ClassCondition
from pra.models.states import PixelDecoder
from pra.sampling.native import NativeSteps, library, steps, unsupported

GUIDED = SamplingConfig(guidance=3.0, steps=2)
LABELS, SEEDS = [0, 4, 2], [10, 11, 12]

needs_compiler = pytest.mark.skipif(library() is None, reason="there is no C++ compiler")


class Wrapped(nn.Module):
    """A module around another, as LoRA, a quantiser or ``torch.compile`` wraps it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return 1.1 * self.inner(*arguments)


def hook(module, factor):
    module.register_forward_hook(lambda module, inputs, output: factor * output)


def wrap_first_block(blocks):
    blocks[0] = Wrapped(blocks[0])


def replace_decoder(model):
    decode = model.codec.decoder.forward

    def halved(states, cache=None):
        return 0.5 * decode(states, cache)

    model.codec.decoder.forward = halved  # type: ignore[method-assign]


def hook_every_linear(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (1.01 * inputs[0],))


class Swapped(ClassCondition):
    def forward(self, labels):
        return -super().forward(labels)


CHANGES = {
    "hooked head": lambda model: hook(model.head, 0.5),
    "head of zeros": lambda model: hook(model.head, 0.0),
    "hooked backbone": lambda model: hook(model.backbone, 1.2),
    "hooked decoder": lambda model: hook(model.codec.decoder, 0.5),
    "hooked linears": hook_every_linear,
    "wrapped head block": lambda model: wrap_first_block(model.head.blocks),
    "wrapped backbone block": lambda model: wrap_first_block(model.backbone.transformer.blocks),
    "wrapped decoder block": lambda model: wrap_first_block(model.codec.decoder.transformer.blocks),
    "other decoder": replace_decoder,
    "other condition": lambda model: setattr(model.condition, "__class__", Swapped),
}


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
@pytest.mark.parametrize("name", CHANGES)
def test_change_of_the_model_shows_in_its_images(name, precision):
    """Exactly as in the plain loop over the modules; also where the sampler has sampled before."""
    model = random_model()
    sampler = Sampler(model, GUIDED, precision)
    before = sampler.sample(LABELS, SEEDS)
    native = library() is not None
    assert (unsupported(model) is None) is native
    CHANGES[name](model)
    after = sampler.sample(LABELS, SEEDS)
    changed = unsupported(model)
    assert native or changed
    assert bool(changed) is (not native or name != "other condition")
    assert isinstance(sampler.idle[3].steps, NativeSteps) is not bool(changed)
    assert (after - before).abs().max() > 0.01
    expected = sample_without_caches(model, GUIDED, LABELS, SEEDS)
    tolerance = 1e-4 if precision is Precision.FLOAT32 else 0.3
    torch.testing.assert_close(after, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(Sampler(model, GUIDED, precision).sample(LABELS, SEEDS), after)


def test_hook_shows_in_the_images_until_it_is_removed():
    model = random_model()
    sampler = Sampler(model, GUIDED)
    before = sampler.sample(LABELS, SEEDS)
    own = model.head.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    assert not torch.equal(sampler.sample(LABELS, SEEDS), before)
    own.remove()
    assert torch.equal(sampler.sample(LABELS, SEEDS), before)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 1.1 * output if isinstance(module, nn.Linear) else None
    )
    try:
        assert not torch.allclose(sampler.sample(LABELS, SEEDS), before, atol=1e-3)
    finally:
        handle.remove()
    assert torch.equal(sampler.sample(LABELS, SEEDS), before)


@needs_compiler
def test_unsupported_knows_parameters_not_configurations(monkeypatch):
    """A new setting that builds another layer must not reach arithmetic that does not know it."""

    class Deeper(PixelDecoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.out = nn.Sequential(self.out, nn.Tanh())

    monkeypatch.setattr("pra.models.states.PixelDecoder", Deeper)
    steps.reference.cache_clear()
    try:
        model = random_model()
        assert unsupported(model) == "codec.decoder.out.0.weight is not known"
        images = Sampler(model, GUIDED).sample(LABELS, SEEDS)
        expected = sample_without_caches(model, GUIDED, LABELS, SEEDS)
        torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)
    finally:
        steps.reference.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.head, "final_norm", nn.LayerNorm(24, eps=1e-3)), "head.final_norm"),
        (lambda model: setattr(model.head.blocks[0].norm, "eps", 1e-3), "head.blocks.0.norm has changed attributes"),
        (lambda model: setattr(model, "write", lambda state, cache=None: state), "the model has changed attributes"),
        (lambda model: setattr(model.backbone, "extra", nn.Identity()), "backbone.extra is not as"),
        (lambda model: nn.utils.parametrizations.weight_norm(model.head.out), "head.out"),
        (lambda model: model.backbone.register_parameter("extra", nn.Parameter(torch.zeros(2))), "backbone.extra"),
        (lambda model: model.double(), "not contiguous float32"),
        (lambda model: model.to("meta"), "not on the CPU"),
    ],
)
def test_unsupported_compares_every_module(change, reason):
    assert [unsupported(random_model(config)) for config in ALL.values()] == [None] * len(ALL)
    model = random_model()
    change(model)
    assert reason in str(unsupported(model))


def test_sampler_says_why_the_modules_run(caplog):
    caplog.set_level(logging.INFO, "pra")
    model = random_model()
    hook(model.head, 0.5)
    sampler = Sampler(model, GUIDED)
    for _ in range(2):
        sampler.sample(LABELS, SEEDS)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("sampling by the model's own modules (")
    assert library() is None or "head has a forward hook" in said


def test_verbose_command_says_how_it_samples(tmp_path, capsys, monkeypatch):
    by_modules(monkeypatch)
    words = ["sample", str(save(random_model(), tmp_path / "model")), "--labels", "3", "--seeds", "0", "--device=cpu"]
    for name, options in (("a.png", ["-v"]), ("b.png", [])):
        assert cli.main([*words, *options, "--out", str(tmp_path / name)]) == 0
        said = capsys.readouterr().err
        assert ("pra: sampling by the model's own modules (" in said) == ("PRA_NATIVE=0" in said) == bool(options)


def test_labels_reach_the_model_in_three_calls():
    """``Sampler.sample`` passes labels to the model's condition, which turns them into tokens."""
    model, found = random_model(), []

    def look(module, inputs):
        names = [frame.function for frame in inspect.stack() if "/torch/" not in frame.filename]
        found.append([name for name in names[1 : names.index("sample")] if not name.startswith("<")])

    model.condition.register_forward_pre_hook(look)
    Sampler(model, SamplingConfig(steps=1)).sample(LABELS, SEEDS)
    # ``_finished`` only joins the images.
    assert found == [["generate", "_pictures", "_finished"]]
