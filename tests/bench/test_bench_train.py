"""``pra bench train``: a step as measured, a training as computed. No time is held to anything."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.refusal import refused
from torch import Tensor

import pra
import pra.method.perceptual
from pra import cli
from pra.bench import plan, training
from pra.bench.training import Seconds, Step, measure_step
from pra.commands import bench_train as training_command
from pra.config import Parallelism, Precision, RunConfig, override
from pra.evaluation import flops
from pra.method import noise
from pra.method.objectives import training_losses
from pra.models import build_model, count_parameters
from pra.utils.distributed import World

CPU = torch.device("cpu")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """``pra bench train``: its code, and what it printed on either side."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["bench", "train", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def perceptual(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution in place of LPIPS's network."""

    def distance(model: Any, device: torch.device, pretrained: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
        assert not pretrained, "nothing is downloaded to measure"
        network = torch.nn.Conv2d(model.channels, 8, 3).to(device).requires_grad_(False)
        return lambda a, b: (network(a) - network(b)).square().flatten(1).mean(1)

    monkeypatch.setattr(pra.method.perceptual, "lpips_distance", distance)


def tiny(**changes: str) -> RunConfig:
    run = pra.recipe("tiny")
    for path, value in changes.items():
        run = override(run, path.replace("__", "."), value)
    return run


# --- measured -----------------------------------------------------------------------------------------------


def test_the_command_measures_a_recipe(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    line = ["tiny", "--steps", 2, "--batch", 4, "--micro", 2, "--device", "cpu", "--tflops", 0.1, "--out", out]
    code, text, _ = call(*line)
    assert code == 0
    assert "2 x 2 images a step" in text
    figures = json.loads(out.read_text())
    measured = figures["measured"]
    assert list(measured["parts"]) == ["clean pass", "codec", "AR pass", "optimiser and average"]
    assert measured["ratio"]["lowest"] <= measured["ratio"]["median"] <= measured["ratio"]["highest"]
    assert figures["images_per_second"] == pytest.approx(4 / measured["step"]["median"])
    assert figures["flops_per_image"] == flops.training_flops(tiny())
    assert figures["mfu"] == pytest.approx(figures["flops_per_image"] * figures["images_per_second"] / 0.1e12)
    other = flops.training_flops(training.teacher_forced(tiny()))
    assert figures["flops_over_teacher_forced"] == figures["flops_per_image"] / other
    assert measured["memory"] > 50 * 2**20  # torch alone is larger
    assert figures["config"]["train"]["micro_batch_size"] == 2
    assert figures["environment"]["versions"]["torch"] == torch.__version__
    for part in ("MFU", "images/s", "step over that", "GiB at the highest, of this process"):
        assert part in text


def test_the_command_measures_a_run(call: Call, trained: Path) -> None:
    code, text, _ = call(trained, "--steps", 1, "--batch", 2, "--device", "cpu", "--tflops", 1)
    assert code == 0
    assert text.startswith("tiny on ")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("digits", ["codec", "AR pass", "optimiser and average"]),  # whose encoder does not see h
        ("tiny:teacher-forced", ["passes", "optimiser and average"]),
        ("tiny:jit", ["passes", "optimiser and average"]),
    ],
)
def test_the_parts_of_other_systems(name: str, parts: list[str]) -> None:
    run = override(pra.recipe(name), "train.batch_size", "2")
    found = measure_step(run, CPU, 1, None)
    assert list(found.parts) == parts
    assert (found.ratio is None) == (run.model.codec is None)


def test_lpips_is_a_part_where_the_run_has_it(call: Call, perceptual: None) -> None:
    line = ["tiny", "--steps", 1, "--batch", 2, "--device", "cpu", "--tflops", 1]
    code, text, _ = call(*line, "--set", "train.objective.perceptual_weight=1")
    assert code == 0
    assert [row.split("  ")[1] for row in text.splitlines() if "%" in row and row.startswith("  ")] == [
        "clean pass", "codec", "LPIPS", "AR pass", "optimiser and average"
    ]  # fmt: skip
    assert "of them LPIPS)" in text
    assert "(without LPIPS)" in text


def test_the_step_learns_and_leaves_nothing_behind() -> None:
    step = Step(tiny(train__batch_size="4"), CPU)
    before = [p.clone() for p in (*step.model.parameters(), *step.averages[0].model.parameters())]
    for _ in range(3):  # what lies behind a zero learns a step later
        step()
    after = [*step.model.parameters(), *step.averages[0].model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in step.model.parameters())
    for piece in step.pieces().values():
        step.forget()
        piece()
    assert any(p.grad is not None for p in step.model.parameters())  # the passes come last, for the update


def test_the_passes_are_what_the_smaller_ones_leave() -> None:
    medians = {"step": 10.0, "clean pass": 1.0, "codec": 3.0, "LPIPS": 2.0, "passes": 9.0, "update": 0.5}
    assert training._parts(medians) == {
        "clean pass": 1.0, "codec": 2.0, "LPIPS": 2.0, "AR pass": 4.0, "optimiser and average": 0.5
    }  # fmt: skip
    assert training.summary([3.0, 1.0, 2.0]) == Seconds(2.0, 1.0, 3.0)


def test_the_teacher_forced_step_keeps_the_backbone() -> None:
    run = pra.recipe("pra-s-256")
    other = training.teacher_forced(run)
    assert other.model.backbone == run.model.backbone
    assert other.model.codec is None
    assert other.model.state_dim == 768


# --- computed -----------------------------------------------------------------------------------------------


def really_saved(run: RunConfig, images: int) -> int:
    """Bytes of what a real step on the CPU keeps for its backward pass."""
    model, storages = build_model(run.model), {}
    labels = torch.zeros(images, dtype=torch.int64)
    pixels = torch.zeros(images, run.model.channels, *run.model.image_size)

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = training_losses(
            model, pixels, labels, noise.keys(0, labels), run.train.objective, run.train.rollout
        )  # fmt: skip
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert losses.total.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in own)


@pytest.mark.parametrize("name", ["tiny", "tiny:jit"])
def test_what_is_counted_is_what_a_step_keeps(name: str) -> None:
    run = override(pra.recipe(name), "train.precision", "float32")
    assert plan._saved_bytes(run, 3, None) == really_saved(run, 3)


def test_memory_and_time() -> None:
    run = tiny(train__batch_size="32", train__micro_batch_size="4")
    needs = plan.needs_of(run)
    assert needs.parameters == sum(count_parameters(run.model).values())
    assert needs.state_bytes == 20 * needs.parameters
    assert needs.flops == flops.training_flops(run)
    assert needs.memory(4) - needs.memory(2) == 2 * needs.image_bytes > 0
    assert plan.device_memory(run, needs, 4) == needs.memory(4)
    sharded = dataclasses.replace(run, train=dataclasses.replace(run.train, parallel=Parallelism.FSDP))
    assert needs.memory(4) - plan.device_memory(sharded, needs, 8) == needs.state_bytes - needs.state_bytes // 8
    # Two micro-batches in a step: until the second is through, each of four devices has all gradients.
    assert plan.device_memory(sharded, needs, 4) - needs.memory(4, 4) == 4 * needs.parameters * 3 // 4
    slow, fast = plan.forecasts(run, needs, 4, 1e12, [0.2, 0.4])
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    assert fast.images_per_second * needs.flops == pytest.approx(4 * 0.4 * 1e12)
    assert fast.seconds == pytest.approx(20 * 32 / fast.images_per_second)


def test_recomputing_and_bfloat16_need_less() -> None:
    run = tiny(train__precision="float32")
    whole = plan._saved_bytes(run, 2, None)
    assert plan._saved_bytes(tiny(train__precision="float32", train__activation_checkpointing="true"), 2, None) < whole
    assert run.train.precision is Precision.FLOAT32
    assert plan._saved_bytes(tiny(), 2, None) < whole


def test_the_command_plans(call: Call, tmp_path: Path, perceptual: None) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = call(
        "tiny", "--plan", "--gpus", 2, "--mfu", "0.25,0.5", "--tflops", 100, "--out", out,
        "--set", "train.objective.perceptual_weight=1",
    )  # fmt: skip
    assert code == 0
    values = json.loads(out.read_text())
    assert [forecast["mfu"] for forecast in values["forecasts"]] == [0.25, 0.5]
    assert values["device_flops"] == 100e12
    needs = values["needs"]
    # Two pictures through a convolution of 8 x 9 weights to 6 x 6 places, and one back.
    assert needs["perceptual_flops"] == 3 * 2 * 8 * 9 * 36
    assert needs["flops"] == flops.training_flops(tiny()) + needs["perceptual_flops"]
    assert "on 2 devices of 100 TFLOP/s" in text
    assert "4 images of a step, 4 at a time, 1 times" in text
    assert os.listdir(tmp_path) == ["plan.json"]


def test_the_command_plans_by_what_it_has_measured(call: Call, tmp_path: Path) -> None:
    bench, out = tmp_path / "bench.json", tmp_path / "plan.json"
    assert call("tiny", "--steps", 1, "--batch", 2, "--device", "cpu", "--tflops", 0.1, "--out", bench)[0] == 0
    measured = json.loads(bench.read_text())
    # Another batch and rollout of the same model.
    settings = ["--batch", 32, "--set", "train.rollout.t_min=0.5"]
    code, text, _ = call("tiny", "--plan", "--gpus", 2, "--measured", bench, "--out", out, *settings)
    assert code == 0, text
    values = json.loads(out.read_text())
    (forecast,) = values["forecasts"]
    assert (forecast["mfu"], values["device_flops"]) == (measured["mfu"], 0.1e12)
    assert forecast["images_per_second"] == pytest.approx(2 * measured["images_per_second"])
    for words, parts in (
        (["digits", "--plan", "--measured", bench], ["bench.json is of another model, tiny", "measure digits"]),
        (["tiny", "--plan", "--measured", out], ["plan.json is not of pra bench train --out", "measure first"]),
        (["tiny", "--plan", "--measured", bench, "--mfu", "0.4"], ["--measured says both: leave out --mfu"]),
        (["tiny", "--plan", "--measured", tmp_path / "none.json"], ["none.json"]),
        (["tiny", "--measured", bench], ["--measured is for --plan"]),
    ):
        code, _, error = call(*words)
        assert (code, error.count("\n")) == (2, 1), words
        assert all(part in error for part in parts), error


def test_durations() -> None:
    assert [training_command._duration(seconds) for seconds in (12.0, 7200.0, 259200.0)] == [
        "12 s", "2 hours", "3 days"
    ]  # fmt: skip


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["tinny"], ["no run at tinny", "did you mean 'tiny'?"]),
        (["hub:user/model"], ["hub:user/model is a model, not a run"]),
        (["tiny", "--steps", "0"], ["--steps 0 must be at least 1"]),
        (["tiny", "--batch", "4", "--micro", "3"], ["batch_size 4 is not divisible by micro_batch_size 3"]),
        (["tiny", "--tflops", "-1"], ["--tflops -1 must be positive"]),
        (["tiny", "--gpus", "4"], ["--gpus is for --plan"]),
        (["tiny", "--plan", "--steps", "4"], ["--steps has no effect with --plan"]),
        (["tiny", "--plan", "--gpus", "3"], ["batch_size 8 does not divide among 3 processes"]),
        (["tiny", "--plan", "--mfu", "40"], ["--mfu '40': shares must lie in (0, 1]"]),
        (["tiny", "--plan", "--mfu", "x"], ["--mfu 'x'"]),
        (["tiny", "--set", "train.stepz=3"], ["stepz", "did you mean 'steps'?"]),
        (["tiny", "--device", "gpu"], ["device 'gpu' cannot be used"]),
        (["tiny", "--out", "."], [". exists already; choose another file"]),
    ],
)
def test_bad_input(call: Call, words: list[str], parts: list[str]) -> None:
    code, _, error = call(*words)
    assert code == 2
    assert error.startswith("pra: error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_one_device_at_a_time(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        def __enter__(self) -> World:
            return World(0, 2)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(training_command, "join", Two)
    code, _, error = call("tiny")
    assert code == 2
    assert "measures one device: start it without torchrun" in error


def test_nothing_is_called_compiled_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    run = override(pra.recipe("tiny:jit"), "train.compile", "true")
    with pytest.warns(UserWarning, match="goes on without"):
        refused(lambda: measure_step(run, CPU, 1, None), "train.compile failed (no compiler)")


def test_too_large_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Step, "passes", full)
    refused(lambda: measure_step(tiny(), CPU, 1, None), "8 images at a time are too many", "cpu", "--batch")
    run = tiny(train__micro_batch_size="4")
    refused(lambda: measure_step(run, CPU, 1, None), "4 images at a time are too many", "--micro")
