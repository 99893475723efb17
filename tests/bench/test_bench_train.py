"""``pra bench train``: a measured step and a planned training. No test sets a limit on time."""

import dataclasses
import functools
import json

import pytest
import torch
from support.answer import caller
from support.refusal import refused

import pra
import pra.method.perceptual
from pra import cli
from pra.bench import training
from pra.bench.training import SyntheticStep, measure_step
from pra.config import Parallelism, apply_settings
from pra.evaluation import flops
from pra.method import noise
from pra.method.objectives import training_losses
from pra.models import build_model, count_parameters

CPU = torch.device("cpu")


@pytest.fixture
def perceptual(monkeypatch):
    """Replace LPIPS's network by one convolution."""

    def distance(model, device, pretrained=True):
        assert not pretrained, "nothing is downloaded to measure"
        network = torch.nn.Conv2d(model.channels, 8, 3).to(device).requires_grad_(False)
        return lambda a, b: (network(a) - network(b)).square().flatten(1).mean(1)

    monkeypatch.setattr(pra.method.perceptual, "lpips_distance", distance)


def tiny(*settings, recipe="tiny"):
    return apply_settings(pra.recipe(recipe), settings)


@pytest.mark.usefixtures("perceptual")
def test_command_measures_a_recipe_and_plans_by_it(capsys, tmp_path):
    """Measure with LPIPS and two micro-batches."""
    call = functools.partial(caller(capsys), "bench", "train")
    bench, out = tmp_path / "bench.json", tmp_path / "plan.json"
    lpips = ["--set", "train.objective.perceptual_weight=1"]
    line = ["tiny", "--steps", 1, "--batch", 4, "--device", "cpu", "--tflops", 0.1, "--out", bench, *lpips]
    text = call(*line, "--set", "train.micro_batch_size=2").out
    for part in ("2 x 2 images", "MFU", "images/s", "step over that", "GiB", "of this process", "of them LPIPS"):
        assert part in text
    figures = json.loads(bench.read_text())
    measured, config = figures["measured"], tiny()
    assert list(measured["parts"]) == ["clean pass", "codec", "LPIPS", "AR pass", "optimiser and average"]
    assert measured["ratio"]["lowest"] <= measured["ratio"]["median"] <= measured["ratio"]["highest"]
    assert figures["images_per_second"] == pytest.approx(4 / measured["step"]["median"])
    counted = flops.training_flops(config)
    assert figures["flops_per_image"] == counted + figures["perceptual_flops_per_image"] > counted
    assert figures["flops_per_second"] == figures["flops_per_image"] * figures["images_per_second"]
    assert figures["mfu"] == pytest.approx(figures["flops_per_second"] / 0.1e12)
    assert figures["flops_over_teacher_forced"] == counted / flops.training_flops(training.teacher_forced(config))
    assert measured["memory"] > 50 * 2**20  # torch alone is larger
    assert figures["config"]["train"]["micro_batch_size"] == 2
    assert figures["environment"]["versions"]["torch"] == torch.__version__

    # A plan may have another batch size and rollout than the measurement, but not another model.
    settings = ["--batch", 32, "--set", "train.rollout.t_min=0.5", *lpips]
    text = call("tiny", "--plan", "--gpus", 2, "--measured", bench, "--out", out, *settings).out
    assert "2 devices" in text
    assert "16 images" in text
    values = json.loads(out.read_text())
    (forecast,) = values["forecasts"]
    assert (forecast["mfu"], values["device_flops"]) == (figures["mfu"], 0.1e12)
    assert forecast["images_per_second"] == pytest.approx(2 * figures["images_per_second"])
    assert forecast["seconds"] == pytest.approx(20 * 32 / forecast["images_per_second"])
    needs = values["needs"]
    # The convolution has 8 x 9 weights and 6 x 6 outputs: two forward passes, and one backward.
    assert needs["flops"] - counted == needs["perceptual_flops"] == 3 * 2 * 8 * 9 * 36
    assert values["device_memory"] == needs["state_bytes"] + needs["fixed_bytes"] + 16 * needs["image_bytes"]
    for words, parts in (
        (["digits", "--plan", "--measured", bench], ["bench.json", "tiny", "digits"]),
        (["tiny", "--plan", "--measured", out], ["plan.json"]),
        (["tiny", "--plan", "--measured", bench, "--mfu", "0.4"], ["--measured", "--mfu"]),
        (["tiny", "--plan", "--measured", tmp_path / "none.json"], ["none.json"]),
    ):
        assert call(*words).is_refusal(*parts)


def test_measure_step_parts_of_other_systems():
    """The recipe `digits` does not need a clean pass: its encoder does not read the condition ``h``."""
    for name, parts in (("digits", ["codec", "AR pass"]), ("tiny:jit", ["passes"])):
        run = tiny("train.batch_size=2", recipe=name)
        found = measure_step(run, CPU, 1, None)
        assert list(found["parts"]) == [*parts, "optimiser and average"]
        assert (found["ratio"] is None) == (run.model.codec is None)
        assert sum(found["parts"].values()) > 0


def test_synthetic_step_learns_and_clears_its_gradients():
    step = SyntheticStep(tiny("train.batch_size=4"), CPU)
    models = (step.model, step.averages["ema"].model)
    before = [p.clone() for model in models for p in model.parameters()]
    for _ in range(3):  # weights before a zero-initialised layer learn one step later
        step()
    after = [p for model in models for p in model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize("name", ["tiny", "tiny:jit"])
def test_saved_bytes_are_what_a_step_keeps(name):
    run = tiny("train.precision=float32", recipe=name)
    model, storages, labels = build_model(run.model), {}, torch.zeros(3, dtype=torch.int64)
    pixels = torch.zeros(3, run.model.channels, *run.model.image_size)

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keys = noise.keys(0, labels)
        losses = training_losses(model, pixels, labels, keys, run.train.objective, run.train.rollout)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert losses.total.requires_grad
    found = training.saved_bytes(run, 3)
    assert found == sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in own)
    if name == "tiny":  # recomputing and bfloat16 need less
        for less in (tiny("train.precision=float32", "train.activation_checkpointing=true"), tiny()):
            assert training.saved_bytes(less, 3) < found


def test_needs_become_memory_and_time():
    run = tiny("train.batch_size=32", "train.micro_batch_size=4")
    needs = training.needs_of(run)
    assert needs.parameters == sum(count_parameters(run.model).values())
    assert needs.state_bytes == 20 * needs.parameters
    assert needs.flops == flops.training_flops(run)
    assert training.device_states(run, needs, 4) == needs.state_bytes
    sharded = dataclasses.replace(run, train=dataclasses.replace(run.train, parallel=Parallelism.FSDP))
    assert training.device_states(sharded, needs, 8) == needs.state_bytes // 8
    # With two micro-batches in a step, each of four devices holds all gradients until the second one ends.
    assert training.device_states(sharded, needs, 4) == needs.state_bytes // 4 + 4 * needs.parameters * 3 // 4
    other = training.teacher_forced(run)
    assert (other.model.backbone, other.model.codec) == (run.model.backbone, None)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "tinny"], ["'tinny'", "did you mean 'tiny'?"]),
        (["train", "hub:user/model"], ["hub:user/model is a model, not a run"]),
        (["train", "tiny", "--steps", "0"], ["--steps must be positive", "got 0"]),
        (["train", "tiny", "--tflops", "-1"], ["--tflops", "-1"]),
        (["train", "tiny", "--gpus", "4"], ["--gpus", "--plan"]),
        (["train", "tiny", "--measured", "bench.json"], ["--measured", "--plan"]),
        (["train", "tiny", "--plan", "--steps", "4"], ["--steps", "--plan"]),
        (["train", "tiny", "--plan", "--gpus", "3"], ["batch_size 8", "3 processes"]),
        (["train", "tiny", "--plan", "--mfu", "40"], ["--mfu '40'"]),
        (["train", "tiny", "--plan", "--mfu", "x"], ["--mfu 'x'"]),
        (["train", "tiny", "--set", "train.stepz=3"], ["stepz", "did you mean 'steps'?"]),
        (["train", "tiny", "--device", "gpu"], ["device 'gpu'"]),
        (["train", "tiny"], ["torchrun"]),
        (["samples", "tiny"], ["no command 'bench samples'; did you mean 'sample'?"]),
        (["sample", "fashoin"], ["fashoin", "did you mean 'fashion'?"]),
        (["sample", "tiny", "--batch", "0"], ["--batch '0'", "lie in [1, 65536]"]),
        (["sample", "tiny", "--precision", "half"], ["--precision: 'half' is unknown"]),
        (["sample", "tiny", "--tflops", "3"], ["--tflops and --bandwidth belong together"]),
        (["sample", "tiny", "--set", "stepz=3"], ["stepz", "did you mean 'steps'?"]),
        (["sample", "tiny:jit", "--counts"], ["tiny:jit is a JiT"]),
    ],
)
def test_command_bad_input_is_one_line(words, parts, monkeypatch, capsys):
    monkeypatch.setattr(training, "saved_bytes", lambda *_: 1)
    if "torchrun" in parts:
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert caller(capsys)("bench", *words).is_refusal(*parts)


@pytest.mark.parametrize("words", [["sample", "tiny", "--counts"], ["train", "tiny", "--plan", "--gpus", "1"]])
def test_command_out_overwrites_nothing_and_knows_home(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(training, "saved_bytes", lambda *_: 1)
    assert cli.main(["bench", *words, "--out", "~/figures.json"]) == 0
    before = (tmp_path / "figures.json").read_text()
    assert "environment" in json.loads(before)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(flops, "sampling_costs", lambda *_: pytest.fail("work began before --out was checked"))
    monkeypatch.setattr(training, "saved_bytes", lambda *_: pytest.fail("work began before --out was checked"))
    for place in ("figures.json", "folder", "figures.json/more.json"):
        assert cli.main(["bench", *words, "--out", f"~/{place}"]) == 2
        assert str(tmp_path / place) in capsys.readouterr().err
    assert (tmp_path / "figures.json").read_text() == before


def test_measure_step_without_a_compiler_is_refused(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    with pytest.warns(UserWarning, match="runs uncompiled"):
        refused(lambda: measure_step(tiny("train.compile=true", recipe="tiny:jit"), CPU, 1, None), "(no compiler)")


def test_measure_step_too_large_for_the_device_is_refused(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SyntheticStep, "passes", full)
    refused(lambda: measure_step(tiny(), CPU, 1, None), "cpu", "--batch", code="too-large", value=8)
