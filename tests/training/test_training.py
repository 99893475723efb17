"""The training loop: what it computes, how it stops and goes on, and what it leaves on the disk."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.files import contents
from support.refusal import refused
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pra
from pra import cli
from pra.config import DataConfig, LearningRate, OptimizerConfig, Precision, RunConfig, override
from pra.data import open_source
from pra.errors import PraError
from pra.method.objectives import Losses, training_losses
from pra.models.pra import PRA
from pra.training import averages, callbacks, checkpoint, loop, optimizer
from pra.training.averages import EMA, exponential
from pra.training.loop import Trained
from pra.training.optimizer import build_optimizer, learning_rate
from pra.training.plots import draw_curves, panels
from pra.training.run import COMMON, loss_terms, points_of, read_metrics
from pra.utils.compiler import compiled
from pra.utils.distributed import World
from pra.utils.locks import locked
from pra.utils.pixels import GAP
from pra.utils.signals import Interrupted

FullDisk = Callable[[int], AbstractContextManager[None]]

SHARD = "shard-00001-model-00001-of-00001.safetensors"
"""What the first process writes of the optimiser's state."""

# So they may, in twenty steps.
pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the steps."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)


def tiny(**train: Any) -> RunConfig:
    """The recipe, without pictures unless asked for."""
    config = pra.recipe("tiny")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **{"sample_every": 0, **train}))


def train(config: RunConfig, folder: Path) -> Trained:
    return pra.train(config, folder, device="cpu", progress=False)


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: model, moving average and optimiser."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema")}
    files["optimizer"] = load_file(folder / "optimizer" / SHARD)
    return {f"{name}/{key}": value for name, tensors in files.items() for key, value in tensors.items()}


def assert_same_state(a: Path, b: Path, step: int) -> None:
    """To the bit."""
    one, other = state(a, step), state(b, step)
    assert one.keys() == other.keys()
    assert len([key for key in one if key.startswith("optimizer/")]) == 3 * len(list(PRA(tiny().model).parameters()))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def steps_logged(run: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(run)]


# --- a whole run --------------------------------------------------------------------------------------------


def test_what_a_run_leaves(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
        "reconstructions",
        "samples",
        "tensorboard",
    ]
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == ["step-00000010", "step-00000020"]
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["threads"] == 1


def test_metrics(trained: Path) -> None:
    rows = read_metrics(trained)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all(row.keys() == {*COMMON, "pixel", "flow", "auxiliary"} for row in rows)
    assert loss_terms(rows) == ["pixel", "flow", "auxiliary"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["total"] < rows[0]["total"]
    assert rows[-1]["epoch"] == pytest.approx(20 * 8 / len(open_source("digits")))


def test_pictures(trained: Path) -> None:
    cell = 64 + GAP
    for kind, columns, rows in (("samples", 8, 10), ("reconstructions", 16, 2)):
        assert [path.name for path in sorted((trained / kind).iterdir())] == ["step-00000010.png", "step-00000020.png"]
        with Image.open(trained / kind / "step-00000020.png") as picture:
            picture.load()
            assert picture.size == (columns * cell + GAP, rows * cell + GAP)
    with Image.open(trained / "curves.png") as picture:
        picture.load()
        assert picture.size == (1320, 660)


def test_reconstructions_of_few_images_stand_below_them(tmp_path: Path) -> None:
    result = train(override(pictures(tmp_path, 5), "train.sample_every", "3"), tmp_path / "run")
    with Image.open(tmp_path / "run" / "reconstructions" / "step-00000003.png") as picture:
        assert picture.size == (5 * (64 + GAP) + GAP, 2 * (64 + GAP) + GAP)
    assert result.model.classes == ("a", "b")


def test_tensorboard_has_the_same_numbers(trained: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    rows = read_metrics(trained)
    for name in rows[0].keys() - {"step"}:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name])) for row in rows]


def test_samples_that_are_not_finite_do_not_stop_a_run(tmp_path: Path) -> None:
    config = override(tiny(steps=2, sample_every=2), "sampling.guidance", "1e300")
    with pytest.warns(UserWarning, match=r"no samples are drawn at step 2: .* not finite"):
        assert train(config, tmp_path / "run").steps == 2
    assert not (tmp_path / "run" / "samples").exists()
    assert (tmp_path / "run" / "reconstructions" / "step-00000002.png").exists()


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory 1 GiB is PyTorch's")


@pytest.mark.parametrize(
    ("what", "error", "reason"),
    [
        ("samples", OUT_OF_MEMORY, "CUDA out of memory. Of the allocated"),
        ("samples", RuntimeError("CUDA error: operation not permitted when stream is capturing"), "CUDA error: operat"),
        ("samples", AssertionError(), "AssertionError"),
        ("reconstructions", OUT_OF_MEMORY, "CUDA out of memory. Of the allocated"),
        ("reconstructions", PraError("the picture is gone"), "the picture is gone"),
        ("pictures", OUT_OF_MEMORY, "CUDA out of memory. Of the allocated"),
    ],
)
def test_whatever_fails_in_drawing_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception, reason: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    owner: Any = {"samples": callbacks.Sampler, "reconstructions": PRA, "pictures": EMA}[what]
    name = {"samples": "sample", "reconstructions": "reconstruct", "pictures": "assembled"}[what]
    monkeypatch.setattr(EMA, "whole", lambda ema: ema.model)
    monkeypatch.setattr(owner, name, fail)
    with pytest.warns(UserWarning, match=rf"^no {what} are drawn at step \d: {reason}") as caught:
        assert train(tiny(steps=2, sample_every=1), tmp_path / "run").steps == 2
    assert not any("\n" in str(warning.message) for warning in caught)
    other = {"samples": "reconstructions", "reconstructions": "samples"}.get(what)
    assert {path.parent.name for path in (tmp_path / "run").rglob("step-*.png")} == ({other} if other else set())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_it_while_it_draws_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def interrupt(*_: Any) -> None:
        raise stop

    monkeypatch.setattr(callbacks.Sampler, "sample", interrupt)
    with pytest.raises(stop):
        train(tiny(steps=2, sample_every=1), tmp_path / "run")


@pytest.fixture
def sharded() -> Iterator[EMA]:
    """A moving average of which processes have parts: of one process, all."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    ema = EMA(PRA(tiny().model), 0.5)
    fully_shard(ema.model, mesh=init_device_mesh("cpu", (1,)))
    yield ema
    torch.distributed.destroy_process_group()


def test_only_the_process_that_draws_builds_a_model_of_parts(sharded: EMA, monkeypatch: pytest.MonkeyPatch) -> None:
    class Second(World):
        def barrier(self, patient: bool = False) -> None:
            pass

    built: list[Any] = []
    monkeypatch.setattr(averages, "build_model", lambda *arguments: built.append(arguments))
    trainer: Any = loop.Trainer.__new__(loop.Trainer)
    trainer.config, trainer.ema, trainer.world = tiny(), sharded, Second(rank=1, size=2)
    trainer.pending, trainer.interval = [], 0.0
    callbacks.Pictures().on_sample(trainer)
    assert built == []
    assert sharded.parts(here=False) == {}


def test_a_model_of_parts_is_whole_again(sharded: EMA) -> None:
    whole = sharded.whole()
    assert whole is not sharded.model
    assert not any(map(optimizer.is_sharded, whole.parameters()))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, optimizer.whole(sharded.model.state_dict()[name]))


def test_checkpoints_are_written_beside_the_process_s_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's thread the current GPU is the first."""
    calls: list[tuple[str, Any]] = []
    write = HuggingFaceStorageWriter.write_data

    def written(*arguments: Any) -> Any:
        calls.append((threading.current_thread().name, "write"))
        return write(*arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", written)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    model = PRA(tiny().model)
    adam = build_optimizer(model, tiny().train.optimizer)
    for number, gpu in enumerate([torch.device("cuda", 3), None]):
        calls.clear()
        saver = checkpoint.Saver(tmp_path, 1, World(), torch.device("cpu"))
        saver._gpu = gpu
        with saver.working():
            saver.save(number, model, {"ema": EMA(model, exponential(0.5))}, adam)
            saver.wait()
        assert threading.main_thread().name not in dict(calls)
        threads, what = zip(*calls, strict=True)
        assert len(set(threads)) == 1
        assert what[: what.index("write")] == (() if gpu is None else (gpu, gpu))


def test_no_pictures_if_none_are_asked_for(tmp_path: Path) -> None:
    train(tiny(steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / "samples").exists()


def test_training_needs_none_of_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard", "matplotlib", "sklearn"):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(callbacks, "draw_curves", draw_curves)
    train(override(pictures(tmp_path, 4), "train.log_every", "1"), tmp_path / "run")
    assert steps_logged(tmp_path / "run") == [1, 2, 3]
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert not (tmp_path / "run" / "curves.png").exists()


def test_a_run_can_be_changed_with_replace_and_sampled_at_once(tmp_path: Path) -> None:
    result = train(tiny(steps=3), tmp_path / "run")
    assert (result.run, result.steps, result.new_steps, result.skipped) == (tmp_path / "run", 3, 3, 0)
    assert pra.Sampler(result.model).sample([3], [0]).shape == (1, 1, 8, 8)


def test_bfloat16(tmp_path: Path) -> None:
    result = train(tiny(steps=1, precision=Precision.BFLOAT16), tmp_path / "run")
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert read_metrics(tmp_path / "run")[0]["total"] != 0


# --- what a step computes -----------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    runs = {}
    for micro in (None, 4, 1):
        folder = tmp_path / str(micro)
        train(tiny(steps=2, log_every=1, micro_batch_size=micro), folder)
        runs[micro] = read_metrics(folder), state(folder, 2)
    rows, tensors = runs[None]
    for micro in (4, 1):
        for row, other in zip(rows, runs[micro][0], strict=True):
            for name in ("total", "pixel", "flow", "auxiliary", "gradient_norm"):
                assert other[name] == pytest.approx(row[name], rel=1e-4), (micro, name)
        for name, tensor in runs[micro][1].items():
            if name.startswith("model/"):
                torch.testing.assert_close(tensor, tensors[name], rtol=1e-3, atol=1e-4)


def test_the_randomness_of_a_sample_depends_on_its_global_index_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys_of(name: str, config: RunConfig) -> Tensor:
        seen: list[Tensor] = []

        def spy(model: PRA, images: Tensor, labels: Tensor, keys: Tensor, *rest: Any) -> Losses:
            seen.append(keys)
            losses: Losses = training_losses(model, images, labels, keys, *rest)
            return losses

        monkeypatch.setattr(loop, "losses_of", lambda model: spy)
        train(config, tmp_path / name)
        return torch.cat(seen)

    whole = keys_of("whole", tiny(steps=4))
    assert len(whole.unique()) == 32
    assert torch.equal(whole, keys_of("micro", tiny(steps=4, micro_batch_size=2)))
    assert torch.equal(whole, keys_of("workers", override(tiny(steps=4), "data.workers", "1")))
    assert torch.equal(whole, keys_of("batch", tiny(steps=2, batch_size=16)))
    assert not torch.isin(whole, keys_of("seed", tiny(steps=4, seed=1))).any()


def test_nothing_depends_on_the_global_random_state(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        train(override(tiny(steps=2), "data.flip", "true"), tmp_path / name)
    assert_same_state(tmp_path / "a", tmp_path / "b", 2)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """Adam's first moment after a step is ``(1 - beta1)`` times the gradient."""
    config = override(tiny(steps=1), "train.optimizer.clip", "0.01")
    train(config, tmp_path / "run")
    moments = [value for name, value in state(tmp_path / "run", 1).items() if name.endswith("/exp_avg")]
    norm = torch.cat([value.flatten() for value in moments]).norm() / (1 - config.train.optimizer.betas[0])
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert read_metrics(tmp_path / "run")[0]["gradient_norm"] > 1.0  # what is logged is the norm before


def test_the_codec_can_be_warmed_up(tmp_path: Path) -> None:
    """Until then the backbone and the head stay as they began; after, they learn."""
    config = pra.config.apply_settings(pra.recipe("tiny"), ["train.codec_warmup=3", "train.sample_every=0"])
    begun = pra.PRA(config.model, seed=config.train.seed).state_dict()
    for steps, learning in ((3, {"codec"}), (4, {"codec", "condition", "backbone", "head", "auxiliary"})):
        pra.train(pra.config.override(config, "train.steps", str(steps)), tmp_path / "run", progress=False)
        now = pra.load(tmp_path / "run", average="raw").state_dict()
        assert {name.split(".")[0] for name in now if not torch.equal(now[name], begun[name])} == learning


def test_metrics_hold_the_terms_of_their_steps(tmp_path: Path) -> None:
    """An interval that ends the codec's warm-up averages each term over the steps that have it."""
    for name, every in (("each", 1), ("both", 2)):
        train(tiny(steps=4, log_every=every, codec_warmup=3), tmp_path / name)
    each, both = read_metrics(tmp_path / "each"), read_metrics(tmp_path / "both")
    assert [loss_terms([row]) for row in each] == [["pixel"]] * 3 + [["pixel", "flow", "auxiliary"]]
    assert [loss_terms([row]) for row in both] == [["pixel"], ["pixel", "flow", "auxiliary"]]
    assert both[1]["flow"] == each[3]["flow"]
    assert both[1]["pixel"] == pytest.approx((each[2]["pixel"] + each[3]["pixel"]) / 2)
    assert points_of(each, "flow") == [(4, each[3]["flow"])]


def test_added_term_is_in_metrics_and_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(*arguments: Any) -> Losses:
        found: Losses = training_losses(*arguments)
        edges = found.terms["pixel"] * 2
        return found._replace(total=found.total + edges, terms=found.terms | {"edges": edges})

    monkeypatch.setattr(loop, "losses_of", lambda model: losses)
    train(tiny(steps=2, log_every=1), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert loss_terms(rows) == ["pixel", "flow", "auxiliary", "edges"]
    assert rows[0]["edges"] == pytest.approx(2 * rows[0]["pixel"])
    titles = panels(rows, tiny().train.objective)
    assert [*titles.values()][:4] == ["pixel", "flow", "auxiliary (weight 0.1)", "edges"]
    assert draw_curves(tmp_path / "run") is not None
    shown = next(word for word in (tmp_path / "run" / "tensorboard").iterdir())
    assert b"edges" in shown.read_bytes()


# Written by version 0.1 before the terms had names of their own; 0 stood for what was not computed.
OLD_LINE = {
    "step": 1, "total": 2.9, "flow": 1.9, "reconstruction": 0.8, "auxiliary": 1.1, "shortcut": 0.0, "state_std": 0.6,
    "gradient_norm": 4.2, "learning_rate": 0.001, "images_per_second": 300.0, "epoch": 0.01, "skipped": 0,
}  # fmt: skip


def test_old_metrics_still_draw_and_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves of a run that goes on have the old name and the new ones."""
    monkeypatch.setattr(callbacks, "draw_curves", draw_curves)
    old = [OLD_LINE | {"step": 10, "flow": 0.0}, OLD_LINE | {"step": 20}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert loss_terms(old) == ["reconstruction", "auxiliary", "flow"]
    assert points_of(old, "flow") == [(20, 1.9)]
    assert draw_curves(run) is not None
    train(tiny(steps=21), run)
    rows = read_metrics(run)
    assert rows[:2] == old
    assert loss_terms(rows) == ["reconstruction", "auxiliary", "flow", "pixel"]


@pytest.mark.slow
def test_a_compiled_step_is_the_same_step(tmp_path: Path) -> None:
    """Up to rounding, which AdamW's first steps enlarge in the weights: so losses and gradients are compared."""
    rows = []
    for name in ("false", "true"):
        settings = [f"train.compile={name}", "train.steps=3", "train.log_every=1", "train.sample_every=0"]
        pra.train(pra.config.apply_settings(pra.recipe("tiny"), settings), tmp_path / name, progress=False)
        rows.append(read_metrics(tmp_path / name))
    for eager, faster in zip(*rows, strict=True):
        for figure in ("total", "pixel", "flow", "auxiliary", "gradient_norm"):
            assert faster[figure] == pytest.approx(eager[figure], rel=1e-4)


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    fast = compiled(lambda x: (x * x).sum(), "train.compile", "do without")
    refused(lambda: fast(torch.ones(3)), "train.compile failed", "install a C++ compiler, or do without")


def test_training_goes_on_without_a_compiler_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    train(tiny(steps=2), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    with pytest.warns(UserWarning, match=r"train.compile failed \(.*no compiler.*\).*goes on without") as caught:
        train(override(tiny(steps=2), "train.compile", "true"), tmp_path / "run")
    assert len([warning for warning in caught if "train.compile" in str(warning.message)]) == 1
    assert_same_state(tmp_path / "plain", tmp_path / "run", 2)


def test_a_compiler_that_fails_on_the_backward_pass_fails_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is still a way without it."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import config as functorch
    from torch._functorch.aot_autograd import make_boxed_func

    if not hasattr(functorch, "force_non_lazy_backward_lowering"):
        pytest.skip("this release of torch always compiles the backward pass when it comes")

    def fail(*_: Any) -> Any:
        raise RuntimeError("no backward pass")

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=fail)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    fast = compiled(lambda x: (x * x).sum(), "this", "do without")
    x = torch.ones(3, requires_grad=True)
    refused(lambda: fast(x), "this failed", "no backward pass", "do without")
    assert not functorch.force_non_lazy_backward_lowering


def test_learning_rate() -> None:
    constant = OptimizerConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(constant, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])
    cosine = dataclasses.replace(constant, schedule=LearningRate.COSINE)
    falling = [learning_rate(cosine, step, 10) for step in range(10)]
    assert falling[:5] == pytest.approx(rates[:5])
    assert all(a > b > 0 for a, b in itertools.pairwise(falling[4:]))
    assert falling[7] == pytest.approx(0.5)  # half-way from the end of the warm-up to the last step
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.0)
    none = dataclasses.replace(constant, warmup_steps=0)
    assert learning_rate(none, 0, 10) == 1.0
    assert learning_rate(dataclasses.replace(cosine, warmup_steps=20), 9, 10) == pytest.approx(10 / 21)


def test_the_logged_rate_is_the_schedule_s(trained: Path) -> None:
    config = tiny().train
    for row in read_metrics(trained):
        assert row["learning_rate"] == learning_rate(config.optimizer, int(row["step"]) - 1, config.steps)


def test_weight_decay_acts_on_matrices_only() -> None:
    model = PRA(pra.recipe("tiny").model)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert decayed == {name for name in linear if before[name].any()}  # what modulates the head begins at zero
    for name in decayed:
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * (1 - 1e-2 * 0.5))
    assert {"condition.embedding.weight", "backbone.next_position"} <= before.keys() - decayed


def test_moving_average() -> None:
    model = PRA(pra.recipe("tiny").model)
    ema = EMA(model, exponential(0.5))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0 + step)
        ema.update(model, step)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, parameter in ema.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert not parameter.requires_grad


# --- going on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps without a stop."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(tiny(steps=12, log_every=2, checkpoint_every=1, keep_checkpoints=100), folder)
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_some_steps_and_then_more_are_all_of_them_at_once(straight: Path, tmp_path: Path, workers: int) -> None:
    config = override(tiny(log_every=2, checkpoint_every=4), "data.workers", str(workers))
    for steps, new in ((5, 5), (6, 1), (12, 6)):
        result = train(override(config, "train.steps", str(steps)), tmp_path / "run")
        assert (result.steps, result.new_steps) == (steps, new)
        assert_same_state(tmp_path / "run", straight, steps)
    assert steps_logged(tmp_path / "run") == [2, 4, 5, 6, 8, 10, 12]  # 5: the last step of a call is always logged
    assert pra.load(tmp_path / "run").sampling == config.sampling


def test_work_after_the_last_checkpoint_is_done_again_and_logged_once(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    for step in range(8, 13):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "tot')  # killed while it wrote
    train(tiny(steps=12, log_every=2), run)
    assert_same_state(run, straight, 12)
    assert steps_logged(run) == [2, 4, 6, 8, 10, 12]
    rows, expected = read_metrics(run), read_metrics(straight)
    assert [row["total"] for row in rows[:3]] == [row["total"] for row in expected[:3]]
    assert [row["total"] for row in rows[4:]] == [row["total"] for row in expected[4:]]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("total")] == [2, 4, 6, 8, 10, 12]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    path = run / "checkpoints" / "step-00000012" / "optimizer" / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000012 is damaged .*step-00000011, is used"):
        result = train(tiny(steps=12), run)
    assert result.new_steps == 1
    assert_same_state(run, straight, 12)


def test_a_damaged_checkpoint_does_not_count_as_kept(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    for step in (11, 12):
        (run / "checkpoints" / f"step-{step:08d}" / "state.json").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        train(tiny(steps=11, keep_checkpoints=1), run)
    left = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert left == ["step-00000011", "step-00000012"]
    assert_same_state(run, straight, 11)


def test_what_a_killed_process_left_of_a_checkpoint_goes(run: Path) -> None:
    partial = run / "checkpoints" / ".step-00000015.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    train(tiny(steps=21), run)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000020", "step-00000021"]


@pytest.mark.parametrize("steps", [20, 7])
def test_as_many_steps_as_there_are_or_fewer_change_nothing(run: Path, steps: int) -> None:
    before = contents(run)
    result = train(tiny(steps=steps), run)
    assert (result.steps, result.new_steps) == (20, 0)
    assert torch.equal(result.model.auxiliary.weight, pra.load(run).auxiliary.weight)
    assert contents(run) == before


def test_pictures_that_a_killed_process_did_not_draw(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "draw_curves", draw_curves)
    before = contents(run)
    for path in ("samples/step-00000020.png", "reconstructions/step-00000020.png", "curves.png"):
        (run / path).unlink()
    assert train(pra.recipe("tiny"), run).new_steps == 0
    assert contents(run).keys() == before.keys()
    assert contents(run)["samples/step-00000020.png"] == before["samples/step-00000020.png"]


def test_what_may_change_on_the_way(run: Path) -> None:
    config = tiny(steps=21, log_every=1, keep_checkpoints=1, micro_batch_size=4)
    for path, value in (("workers", "1"), ("on_corrupt", "skip"), ("on_small", "upscale")):
        config = override(config, f"data.{path}", value)
    config = override(config, "sampling.guidance", "3")
    assert train(config, run).new_steps == 1
    assert pra.load(run).sampling.guidance == 3.0
    assert json.loads((run / "config.json").read_text())["data"]["on_corrupt"] == "skip"


@pytest.mark.parametrize(
    ("path", "value", "difference"),
    [
        ("train.batch_size", "4", "train.batch_size: 8 in the run, 4 asked for"),
        ("train.seed", "1", "train.seed: 0 in the run, 1 asked for"),
        ("train.optimizer.lr", "0.5", "train.optimizer.lr: 0.001 in the run, 0.5 asked for"),
        ("model.backbone.depth", "3", "model.backbone.depth: 2 in the run, 3 asked for"),
        ("data.flip", "true", "data.flip: false in the run, true asked for"),
        ("train.rollout", "Clean", 'train.rollout.type: "Parallel" in the run, "Clean" asked for'),
    ],
)
def test_a_run_of_another_configuration(run: Path, path: str, value: str, difference: str) -> None:
    before = contents(run)
    config = override(tiny(steps=30), path, value)
    refused(lambda: train(config, run), str(run), difference, "nothing was changed", "another --run-dir")
    assert contents(run) == before


def test_a_run_whose_checkpoints_are_all_damaged(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    before = contents(run)
    refused(lambda: train(tiny(steps=30), run), "no checkpoint of", "step-00000010 is damaged", "remove them")
    assert contents(run) == before


def test_a_run_that_was_damaged_by_hand(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step"', "step", 1))
    refused(lambda: train(tiny(steps=30), run), "metrics.jsonl, line 1 is damaged", "delete the line")
    (run / "config.json").write_text('{"recipe": ')
    before = contents(run)
    refused(lambda: train(tiny(steps=30), run), "config.json is no JSON")
    assert contents(run) == before


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    refused(lambda: train(tiny(), tmp_path), "is not empty and is no run", "another --run-dir")
    refused(lambda: train(tiny(), tmp_path / "mine"), "is a file", "another --run-dir")
    refused(lambda: train(tiny(steps=1), tmp_path / "mine" / "run"), "cannot be written: Not a directory")
    assert contents(tmp_path) == {"mine": b"x"}
    (tmp_path / "empty").mkdir()
    assert train(tiny(steps=1), tmp_path / "empty").steps == 1


# --- two at once --------------------------------------------------------------------------------------------


def test_a_second_training_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    """Real processes. The first is killed in the end, with a worker that lives a little longer: its lock is gone."""
    run, config = tmp_path / "run", override(pictures(tmp_path, 12), "data.workers", "1")
    config = override(override(config, "train.log_every", "1"), "train.checkpoint_every", "3")
    options = ["train.sample_every=0", "train.log_every=1", "train.checkpoint_every=3", "data.workers=1"]
    command = ["train", "tiny", "--data", config.data.source, "--run-dir", str(run), "--steps", "1000000"]
    process = start([*command, "--device", "cpu", *(part for option in options for part in ("--set", option))])
    try:
        wait_for(lambda: run.exists() and len(steps_logged(run)) >= 4 and saved(run), process)
        refused(lambda: train(config, run), f"{run} is being trained by process {process.pid} on ", "--run-dir")
        assert pra.load(run).classes == ("a", "b")  # looking on is free
        reached = len(steps_logged(run))
        wait_for(lambda: len(steps_logged(run)) > reached + 3, process)
        assert [row["step"] for row in read_metrics(run)] == list(range(1, len(read_metrics(run)) + 1))
    finally:
        process.kill()
        process.wait()  # and not for the worker, which has its standard error
    assert (run / ".lock").exists()
    more = checkpoint.step_of(pra.models.weights.newest_checkpoint(run)) + 1  # type: ignore[arg-type]
    assert train(override(config, "train.steps", str(more)), run).new_steps == 1
    assert not (run / ".lock").exists()
    process.communicate()


def test_a_lock_changes_nothing_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    with locked(run, "trained", "choose another --run-dir"):
        refused(lambda: train(tiny(steps=21), run), f"is being trained by process {os.getpid()} on ")
        assert {name: data for name, data in contents(run).items() if name != ".lock"} == before
    assert contents(run) == before
    with locked(tmp_path / "new" / "run", "trained", "choose another --run-dir"):
        assert (tmp_path / "new" / "run" / ".lock").exists()
    assert not (tmp_path / "new").exists()


def test_a_lock_that_a_killed_process_left_before_it_wrote_anything(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere")
    assert train(tiny(steps=1), tmp_path / "run").steps == 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_that_goes_just_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ends and removes it between the other's two calls: what that holds is then no longer the file."""
    path, original, calls = tmp_path / ".lock", fcntl.flock, [0]

    def flock(descriptor: int, how: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            path.unlink()
        original(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, "trained", "wait"):
        assert path.exists()
        refused(lambda: locked(tmp_path, "filled", "wait").__enter__(), "is being filled by", "or wait")


def test_where_nothing_can_be_locked_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"):
        train(tiny(steps=1), tmp_path / "network")
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    train(tiny(steps=1), tmp_path / "windows")
    for name in ("network", "windows"):
        assert not (tmp_path / name / ".lock").exists()


# --- stopping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGKILL, 0)])
def test_a_signal_and_the_same_command_again(tmp_path: Path, signum: signal.Signals, workers: int) -> None:
    """A real process, interrupted in the middle; what follows equals a run without a stop."""
    run, config = tmp_path / "run", pictures(tmp_path, 12)
    options = ["train.sample_every=0", "train.log_every=1", "train.checkpoint_every=3", f"data.workers={workers}"]
    command = [
        "train",
        "tiny",
        "--data",
        config.data.source,
        "--run-dir",
        str(run),
        "--steps",
        "1000000",
        "--device",
        "cpu",
    ]
    command += [part for option in options for part in ("--set", option)]
    process = start(command)
    wait_for(lambda: run.exists() and len(steps_logged(run)) >= 5 and saved(run), process)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    reached = checkpoint.step_of(pra.models.weights.newest_checkpoint(run))  # type: ignore[arg-type]
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
        assert reached % 3 == 0
    else:
        assert process.returncode == 128 + signum
        last = error.replace("\r", "\n").strip().splitlines()[-1]
        assert last.startswith(f"pra: stopped at step {reached}, saved in {run}; the same command goes on from there: ")
        assert last.endswith("pra " + " ".join(command))
        assert steps_logged(run) == list(range(1, reached + 1))
    assert "Traceback" not in error
    config = override(override(config, "train.steps", str(reached + 4)), "train.log_every", "1")
    assert train(override(config, "data.workers", str(workers)), run).new_steps == 4
    train(config, tmp_path / "straight")
    assert_same_state(run, tmp_path / "straight", reached + 4)
    assert steps_logged(run) == list(range(1, reached + 5))


def saved(run: Path) -> bool:
    """Whether a checkpoint is there: they are written while training goes on."""
    return pra.models.weights.newest_checkpoint(run) is not None


def start(command: list[str]) -> subprocess.Popen[str]:
    source = str(Path(pra.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "pra", *command],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *signals: signal.Signals) -> None:
    """The process gets signals while it computes the losses of ``step`` (from 1)."""
    calls = [0]

    def losses(*arguments: Any) -> Losses:
        calls[0] += 1
        if calls[0] == step:
            for signum in signals:
                signal.raise_signal(signum)
        found: Losses = training_losses(*arguments)
        return found

    monkeypatch.setattr(loop, "losses_of", lambda model: losses)


def test_the_step_is_finished_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    interrupt_in_step(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped at step 2") as raised:
        train(tiny(steps=12), tmp_path / "run")
    assert raised.value.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in_step(monkeypatch, 3, signal.SIGTERM)
    assert train(tiny(steps=3), tmp_path / "run").steps == 3


def test_a_signal_just_after_the_checkpoint_waits_for_the_next_step(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not saved must not be given up."""
    original = loop.Trainer._log

    def log(self: loop.Trainer, *arguments: Any) -> None:
        original(self, *arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Trainer, "_log", log)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        train(tiny(steps=12, log_every=2, checkpoint_every=10), tmp_path / "run")
    assert_same_state(tmp_path / "run", straight, 3)


def test_a_second_ctrl_c_stops_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: data for name, data in contents(run).items() if name.startswith("checkpoints")}
    interrupt_in_step(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(steps=30), run)
    assert {name: data for name, data in contents(run).items() if name.startswith("checkpoints")} == before


def test_workers_end_with_the_run_whoever_keeps_the_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that lives on would keep the whole process from ending: it ignores SIGTERM."""
    before = multiprocessing.active_children()
    interrupt_in_step(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Interrupted) as kept:
        train(override(tiny(), "data.workers", "1"), tmp_path / "run")
    assert multiprocessing.active_children() == before
    assert kept.value.signum == signal.SIGTERM


def test_in_another_thread_signals_are_left_alone(tmp_path: Path) -> None:
    steps: list[int] = []
    worker = threading.Thread(target=lambda: steps.append(train(tiny(steps=1), tmp_path / "run").steps))
    worker.start()
    worker.join()
    assert steps == [1]


def spoil_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of the ``step``-th call (from 1) is not a number."""
    calls = [0]

    def losses(*arguments: Any) -> Losses:
        calls[0] += 1
        found: Losses = training_losses(*arguments)
        return found._replace(total=found.total * (math.nan if calls[0] == step else 1.0))

    monkeypatch.setattr(loop, "losses_of", lambda model: losses)


@pytest.mark.parametrize("every", [{"log_every": 5}, {"log_every": 100, "sample_every": 4}])
def test_a_loss_that_is_not_finite(run: Path, monkeypatch: pytest.MonkeyPatch, every: dict[str, int]) -> None:
    before = contents(run)
    spoil_step(monkeypatch, 3)
    refused(
        lambda: train(tiny(steps=40, checkpoint_every=10, **every), run),
        "not finite at step 23 (global samples 176 to 183)",
        f"the last good checkpoint is {run / 'checkpoints' / 'step-00000020'}",
        "lower train.optimizer.lr",
    )
    after = contents(run)
    for folder in ("checkpoints", "samples"):
        assert {k: v for k, v in after.items() if k.startswith(folder)} == {
            k: v for k, v in before.items() if k.startswith(folder)
        }
    assert after["metrics.jsonl"] == before["metrics.jsonl"]
    assert all(value.isfinite().all() for value in pra.load(run).state_dict().values())


def test_no_checkpoint_of_what_is_not_finite_when_a_signal_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in_step(monkeypatch, 3, signal.SIGTERM)
    spoil_step(monkeypatch, 2)
    refused(lambda: train(tiny(steps=12), tmp_path / "run"), "not finite at step 2", "there is no earlier checkpoint")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_learning_rate_that_is_far_too_high(tmp_path: Path) -> None:
    config = override(override(tiny(), "train.optimizer.lr", "1e30"), "train.optimizer.clip", "1e30")
    refused(lambda: train(config, tmp_path / "run"), "is not finite at step")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("size", [3_000, 120_000, 400_000])
def test_a_full_disk_while_saving(run: Path, full_disk: FullDisk, straight: Path, size: int) -> None:
    """It ends within the configuration or metrics, within the weights, within the optimiser's state."""
    before = contents(run / "checkpoints")
    with full_disk(size):
        refused(lambda: train(tiny(steps=21), run), "File too large", "nothing was left half-written")
    assert contents(run / "checkpoints") == before
    assert not list(run.rglob("*.partial"))
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert train(tiny(steps=21), run).new_steps == 1


def test_the_message_of_a_full_disk(run: Path, full_disk: FullDisk) -> None:
    with full_disk(120_000):
        refused(
            lambda: train(tiny(steps=21), run),
            f"{run / 'checkpoints' / 'step-00000021'} cannot be written",
            f"the last good checkpoint is {run / 'checkpoints' / 'step-00000020'}",
            "raise the limit on the size of files",
        )


def test_only_a_full_disk_asks_for_space(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.ENOSPC, errno.EIO):

        def fail(*_: Any, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(checkpoint.weights, "write_tensors", fail)
        with pytest.raises(pra.PraError, match=os.strerror(code)) as raised:
            train(tiny(steps=21), run)
        assert ("free some space" in str(raised.value)) == (code == errno.ENOSPC)


def test_a_full_disk_while_logging(run: Path, full_disk: FullDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    original = callbacks.Metrics.write

    def write(self: Any, row: dict[str, float]) -> None:
        with full_disk(self.path.stat().st_size + 10):
            original(self, row)

    monkeypatch.setattr(callbacks.Metrics, "write", write)
    refused(lambda: train(tiny(steps=30, log_every=1), run), "metrics.jsonl", "step-00000020", "size of files")
    monkeypatch.undo()
    train(tiny(steps=21), run)
    assert steps_logged(run) == [5, 10, 15, 20, 21]


@pytest.mark.parametrize(("deviation", "mentioned"), [(0.4, 0), (0.25, 1), (0.0, 1)])
def test_collapsing_states_are_mentioned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deviation: float, mentioned: int
) -> None:
    """Healthy runs go down to 0.4 on their way."""
    monkeypatch.setattr("pra.method.objectives._state_std", lambda z: torch.tensor(deviation))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train(tiny(log_every=1), tmp_path / "run")
    said = "a state dimension varies little (state_std below 0.3 in metrics.jsonl): the states may be collapsing"
    assert [str(warning.message) for warning in caught if "collapsing" in str(warning.message)] == mentioned * [said]


# --- data ---------------------------------------------------------------------------------------------------


def pictures(folder: Path, count: int, size: tuple[int, int] = (8, 8)) -> RunConfig:
    """Three steps on ``count`` random pictures of two classes, width x height ``size``."""
    for index in range(count):
        path = folder / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(index).integers(0, 256, size[::-1], np.uint8)
        Image.fromarray(values).save(path)
    config = tiny(steps=3, log_every=3)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=2),
        data=DataConfig(source=f"folder:{folder / 'data'}"),
    )


def test_corrupt_images_are_counted(tmp_path: Path) -> None:
    config = pictures(tmp_path, 12)
    (tmp_path / "data" / "a" / "4.png").write_bytes(b"\x89PNG")
    refused(lambda: train(config, tmp_path / "run"), "4.png", "data.on_corrupt=skip")
    # Whatever was done before it was met, the way out works on the same folder.
    result = train(override(config, "data.on_corrupt", "skip"), tmp_path / "run")
    assert result.steps == 3
    assert result.skipped == 2  # 24 samples of 12 images
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 2


def test_images_that_are_too_small_are_named_before_anything_is_written(tmp_path: Path) -> None:
    config = pictures(tmp_path, 4, (8, 7))
    refused(lambda: train(config, tmp_path / "run"), "7x8 pixels", "data.on_small=upscale")
    assert not (tmp_path / "run").exists()


def test_more_classes_than_the_model_has(tmp_path: Path) -> None:
    config = pictures(tmp_path, 4)
    config = override(config, "model.num_classes", "1")
    refused(lambda: train(config, tmp_path / "run"), "label 1 (b)", "set model.num_classes to 2")
    assert not (tmp_path / "run").exists()


def test_what_needs_no_data_is_said_before_they_are_opened(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_early(spec: str) -> None:
        raise AssertionError(f"{spec} is opened")

    monkeypatch.setattr("pra.commands.train.open_source", too_early)
    monkeypatch.setattr("pra.commands.train.join", lambda: nullcontext(World(0, 3)))
    assert cli.main(["train", "tiny", "--run-dir", str(tmp_path / "new"), "--device", "cpu"]) == 2
    assert "batch_size 8 does not divide among 3 processes" in capsys.readouterr().err
    monkeypatch.setattr("pra.commands.train.join", lambda: nullcontext(World()))
    assert cli.main(["train", "tiny", "--run-dir", str(run), "--device", "cpu", "--seed", "1"]) == 2
    assert f"{run} is a run of another configuration (train.seed: 0 in the run" in capsys.readouterr().err


def test_a_run_of_other_classes_than_the_recipe_s_goes_on(tmp_path: Path) -> None:
    """How many there are the data say, which are opened later."""
    config = pictures(tmp_path, 12)
    line = ["train", "tiny", "--data", config.data.source, "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    for steps in ("1", "2"):
        assert cli.main([*line, "--steps", steps, "--set", "train.sample_every=0"]) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_device_without_enough_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop.Trainer, "_losses", full)
    parts = ("4 images at a time are too many for the memory of cpu", "train.micro_batch_size", "activation_checkpoint")
    refused(lambda: train(tiny(micro_batch_size=4), tmp_path / "run"), *parts)


def test_a_worker_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does where memory runs out."""
    config = override(pictures(tmp_path, 12), "data.workers", "1")
    monkeypatch.setattr(loop.TrainingSet, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    refused(lambda: train(config, tmp_path / "run"), "prepares data has died", "data.workers", "shared memory")


def test_lpips_is_fetched_by_one_process_before_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class One(World):
        @contextmanager
        def first_alone(self) -> Iterator[None]:
            order.append("alone")
            yield
            order.append("all")

    def fetch(*_: Any) -> Any:
        order.append("fetch")
        return lambda reconstruction, image: (reconstruction - image).square().mean((1, 2, 3))

    monkeypatch.setattr("pra.method.perceptual.lpips_distance", fetch)
    config = override(tiny(steps=1), "train.objective.perceptual_weight", "1.0")
    pra.train(config, tmp_path / "run", device="cpu", progress=False, world=One())
    assert order == ["alone", "fetch", "all"]


def test_an_open_source_in_place_of_the_named_one(tmp_path: Path) -> None:
    config = dataclasses.replace(pictures(tmp_path, 4), data=DataConfig(source="elsewhere"))
    source = open_source(f"folder:{tmp_path / 'data'}")
    result = pra.train(config, tmp_path / "run", device="cpu", source=source, progress=False)
    assert result.model.classes == ("a", "b")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    for device in ("gpu", "meta", "hpu", ""):
        refused(lambda: pra.train(tiny(), tmp_path / "run", device=device), f"device {device!r}", "leave it out")  # noqa: B023
    assert not (tmp_path / "run").exists()


def test_renamed_classes_stop_a_resume(tmp_path: Path) -> None:
    """A label must go on meaning what it meant."""
    for name in ("blue", "green"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), index).save(tmp_path / "data" / name / f"{index}.png")
    config = pra.recipe("tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=2),
        data=dataclasses.replace(config.data, source=f"folder:{tmp_path / 'data'}"),
        train=dataclasses.replace(config.train, steps=1, sample_every=0),
    )
    pra.train(config, tmp_path / "run", device="cpu", progress=False)
    (tmp_path / "data" / "blue").rename(tmp_path / "data" / "zblue")
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    before = contents(tmp_path / "run")
    refused(lambda: pra.train(more, tmp_path / "run", device="cpu", progress=False), "'green'", "'blue'", "--run-dir")
    assert contents(tmp_path / "run") == before
