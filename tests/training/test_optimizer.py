"""Optimizers: which parameters each one trains, at which rate, and how a run with Muon resumes."""

import dataclasses
import itertools

import pytest
import torch
from support.models import JIT, LEARNED
from support.refusal import refused
from support.training import assert_same, tensors, tiny, train
from torch import nn

import pra
from pra.config import LearningRate, Muon, OptimizerConfig, RunConfig, apply_settings, from_dict, to_dict
from pra.models import build_model
from pra.training.optimizer import (
    MuonOptimizer,
    Optimizers,
    build_optimizer,
    hidden_matrices,
    learning_rate,
    orthogonalised,
)

MUON = "train.optimizer.matrices=Muon"
TWO_HEADS = dataclasses.replace(LEARNED, head=dataclasses.replace(LEARNED.head, shortcut=True))
SHAPES = [(8, 8), (24, 8), (8, 24), (7, 5), (1, 4)]


def test_settings_bare_name_keeps_the_other_rates():
    run = pra.recipe("tiny")
    changed = apply_settings(run, [MUON, "train.optimizer.matrices.lr=0.01"])
    expected = dataclasses.replace(run.train.optimizer, matrices=Muon(lr=0.01))
    assert changed.train.optimizer == expected
    assert from_dict(RunConfig, to_dict(changed)) == changed
    assert apply_settings(changed, ["train.optimizer.matrices=null"]) == run


def test_settings_that_are_wrong_are_refused():
    for settings, message in (
        (["train.optimizer.matrices=Moun"], "'Moun' is unknown; did you mean 'Muon'"),
        (["train.optimizer.matrices=3"], "expected the fields of Muon, got 3"),
        ([MUON, "train.optimizer.matrices.lr=0"], "lr must be positive and finite, got 0"),
        ([MUON, "train.optimizer.matrices.momentum=1"], "momentum must lie in [0, 1), got 1"),
        ([MUON, "train.optimizer.matrices.rate=1"], "'rate' is unknown"),
        (["train.optimizer.matrices.lr=0.01"], "no setting 'train.optimizer.matrices.lr'"),
    ):
        refused(lambda settings=settings: tiny(*settings), message)


def test_slower_divides_every_rate():
    config = OptimizerConfig(lr=0.5, matrices=Muon(lr=0.25))
    assert config.slower(10) == OptimizerConfig(lr=0.5 / 10, matrices=Muon(lr=0.25 / 10))
    assert OptimizerConfig(lr=0.5).slower(10) == OptimizerConfig(lr=0.5 / 10)
    assert config.rates() == "0.5 (Muon on the blocks' matrices: 0.25)"


def test_learning_rate_warms_up_then_stays_or_falls():
    constant = OptimizerConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(constant, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])
    cosine = dataclasses.replace(constant, schedule=LearningRate.COSINE)
    falling = [learning_rate(cosine, step, 10) for step in range(10)]
    assert falling[:5] == pytest.approx(rates[:5])
    assert all(a > b > 0 for a, b in itertools.pairwise(falling[4:]))
    assert falling[7] == pytest.approx(0.5)  # half-way from the end of the warm-up to the last step
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.0)
    linear = dataclasses.replace(constant, schedule=LearningRate.LINEAR)
    steps = [learning_rate(linear, step, 10) for step in range(linear.warmup_steps, 11)]
    assert steps == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert learning_rate(dataclasses.replace(constant, warmup_steps=0), 0, 10) == 1.0
    assert learning_rate(dataclasses.replace(cosine, warmup_steps=20), 9, 10) == pytest.approx(10 / 21)


def test_weight_decay_acts_on_matrices_only():
    model = build_model(pra.recipe("tiny").model)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert decayed == {name for name in linear if before[name].any()}  # modulations begin at zero
    for name in decayed:
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * (1 - 1e-2 * 0.5))
    assert {"condition.embedding.weight", "backbone.next_position"} <= before.keys() - decayed


@pytest.mark.parametrize("config", [TWO_HEADS, JIT])
def test_hidden_matrices_are_those_inside_blocks(config):
    model = build_model(config)
    hidden = {id(weight) for weight in hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in hidden}
    inside = ("attention.qkv.weight", "attention.out.weight", "mlp.into.weight", "mlp.out.weight")
    assert names == {name for name, _ in model.named_parameters() if name.endswith(inside)}
    assert {name.partition(".")[0] for name in names} <= {"backbone", "head", "shortcut", "codec", "blocks"}


def test_build_optimizer_trains_every_parameter_once():
    model = build_model(LEARNED)
    for parameter in model.auxiliary.parameters():
        parameter.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(matrices=Muon()))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len(set(trained))
    assert set(trained) == {p for p in model.parameters() if p.requires_grad}
    assert optimizer.state(model.auxiliary.weight) == {}


def test_set_rates_scales_each_group_from_its_own_peak():
    config = OptimizerConfig(lr=1.0, matrices=Muon(lr=3.0), warmup_steps=3)
    optimizer = build_optimizer(build_model(LEARNED), config)
    for step, factor in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        optimizer.set_rates(config, step, 10)
        assert [group["lr"] for group in optimizer.param_groups] == [factor, factor, 3 * factor]
        assert learning_rate(config, step, 10) == factor


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_steps_equal_torchs(shape):
    """Steps are equal up to the rounding of bfloat16, in which torch's class computes."""
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = MuonOptimizer([ours], lr=0.01, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.01, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_singular_values_are_near_one(shape):
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.1, 1.0, len(values))
    found = orthogonalised(left @ values.diag() @ right)
    assert found.shape == shape
    assert ((torch.linalg.svdvals(found) - 1).abs() < 0.35).all()


def test_muon_of_no_gradient_changes_nothing():
    matrix = nn.Parameter(torch.ones(2, 3))
    optimizer = Optimizers(MuonOptimizer([matrix], lr=1.0, momentum=0.95, weight_decay=0.1))
    optimizer.step()
    assert torch.equal(matrix, torch.ones(2, 3))
    MuonOptimizer([], lr=1.0, momentum=0.95, weight_decay=0.1).step()


@pytest.mark.parametrize(("recipe", "settings"), [("tiny", [MUON]), ("tiny:plus", [])])
def test_muon_run_resumes_bitwise(recipe, settings, tmp_path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(tiny(*settings, "train.steps=3", recipe=recipe), straight)
    for steps in (1, 3):
        train(tiny(*settings, f"train.steps={steps}", recipe=recipe), run)
    assert_same(straight, run)
    buffers = [name for name in tensors(run) if name.endswith("/momentum_buffer")]
    assert len(buffers) == len(hidden_matrices(build_model(tiny(recipe=recipe).model)))
    without = tiny("train.optimizer.matrices=null", "train.steps=5", recipe=recipe)
    refused(lambda: train(without, run), "train.optimizer.matrices: {", "null asked for", code="mismatch")
