"""Callbacks: the package's own, which draw and log, the user's, and Weights & Biases."""

import functools
import itertools
import sys
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from support.files import contents
from support.processes import api
from support.refusal import refused
from support.training import assert_same, steps_logged, tiny, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pra
from pra.config import apply_settings
from pra.errors import PraError
from pra.models.pra import PRA
from pra.models.weights import checkpoints
from pra.training import averages, callbacks, loop, optimizer
from pra.training.averages import EMA, exponential
from pra.training.plots import draw_curves
from pra.training.run import read_metrics, read_run
from pra.utils.distributed import World
from pra.utils.pixels import GAP


def test_pictures_have_their_rows_and_columns(trained):
    cell = 64 + GAP
    for kind, columns, rows in (("samples", 8, 10), ("reconstructions", 16, 2)):
        assert [path.name for path in sorted((trained / kind).iterdir())] == ["step-00000010.png", "step-00000020.png"]
        with Image.open(trained / kind / "step-00000020.png") as picture:
            assert picture.size == (columns * cell + GAP, rows * cell + GAP)
    with Image.open(trained / "curves.png") as picture:
        assert picture.size == (1344, 700)


def test_pictures_that_a_killed_process_did_not_draw(run, monkeypatch):
    monkeypatch.setattr(callbacks, "draw_curves", draw_curves)
    before = contents(run)
    for path in ("samples/step-00000020.png", "reconstructions/step-00000020.png", "curves.png"):
        (run / path).unlink()
    assert pra.train(pra.recipe("tiny"), run, device="cpu", progress=False).new_steps == 0
    assert contents(run).keys() == before.keys()
    assert contents(run)["samples/step-00000020.png"] == before["samples/step-00000020.png"]


def test_tensorboard_has_the_numbers_of_the_metrics(trained):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    rows = read_metrics(trained)
    for name in rows[0].keys() - {"step"}:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(row["step"], pytest.approx(row[name])) for row in rows]


def test_training_without_extras_writes_metrics(tmp_path, monkeypatch):
    for package in ("tensorboard", "matplotlib"):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(callbacks, "draw_curves", draw_curves)
    pra.train(tiny(), tmp_path / "run", device="cpu", progress=False)
    assert steps_logged(tmp_path / "run") == [1, 2]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "config.json", "environment.json", "metrics.jsonl"}


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory 1 GiB is PyTorch's")


@pytest.mark.parametrize(
    ("what", "owner", "name", "error", "reason"),
    [
        (["samples"], callbacks.Sampler, "sample", OUT_OF_MEMORY, "CUDA out of memory. Of the allocated"),
        (["samples"], callbacks.Sampler, "sample", AssertionError(), "AssertionError"),
        (["reconstructions"], PRA, "reconstruct", PraError("the picture is gone"), "the picture is gone"),
        (["samples", "reconstructions"], EMA, "assembled", OUT_OF_MEMORY, "CUDA out of memory. Of the allocated"),
    ],
)
def test_pictures_that_fail_are_a_warning(tmp_path, monkeypatch, what, owner, name, error, reason):
    def fail(*_):
        raise error

    monkeypatch.setattr(EMA, "whole", lambda ema: ema.model)
    monkeypatch.setattr(owner, name, fail)
    with pytest.warns(UserWarning, match="are drawn") as caught:
        assert train(tiny("train.steps=1", "train.sample_every=1"), tmp_path / "run").steps == 1
    told = [str(warning.message) for warning in caught if "are drawn" in str(warning.message)]
    assert [line.startswith(f"no {kind} are drawn at step 1: {reason}") for kind, line in zip(what, told, strict=True)]
    assert not any("\n" in line for line in told)
    drawn = {path.parent.name for path in (tmp_path / "run").rglob("step-*.png")}
    assert drawn == {"samples", "reconstructions"} - set(what)


def test_pictures_can_be_interrupted(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(callbacks.Sampler, "sample", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny("train.steps=1", "train.sample_every=1"), tmp_path / "run")


@pytest.fixture
def sharded():
    """A moving average that is sharded over processes; with one process, the whole average."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    ema = EMA(PRA(tiny().model), exponential(0.5))  # type: ignore[arg-type]
    fully_shard(ema.model, mesh=init_device_mesh("cpu", (1,)))
    yield ema
    torch.distributed.destroy_process_group()


def test_pictures_build_a_sharded_model_on_rank_0_only(sharded, monkeypatch):
    class Second(World):
        def barrier(self, patient=False):
            pass

    trainer = loop.Trainer.__new__(loop.Trainer)
    trainer.config, trainer.ema, trainer.world = tiny(), sharded, Second(rank=1, size=2)
    trainer.pending, trainer.interval = [], 0.0
    with monkeypatch.context() as patch:
        patch.setattr(averages, "build_model", lambda *_: pytest.fail("built"))
        callbacks.Pictures().on_sample(trainer)
    assert sharded.parts(here=False) == {}
    whole = sharded.whole()
    assert not any(map(optimizer.is_sharded, whole.parameters()))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, optimizer.whole(sharded.model.state_dict()[name]))


def test_state_warning_comes_once_below_the_limit(tmp_path):
    """Healthy runs reach 0.4 during training."""
    trainer = SimpleNamespace(config=tiny("train.optimizer.warmup_steps=3"), step=4, folder=tmp_path)
    metrics = callbacks.Metrics()
    metrics.path = tmp_path / "metrics.jsonl"
    said = "a state dimension varies little (state_std below 0.3 in metrics.jsonl): the states may be collapsing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        metrics.on_log(trainer, {"state_std": 0.4})
        metrics.on_log(SimpleNamespace(config=trainer.config, step=3), {"state_std": 0.0})  # type: ignore[arg-type]
        assert not caught
        for deviation in (0.25, 0.0):
            metrics.on_log(trainer, {"state_std": deviation})
    assert [str(warning.message) for warning in caught] == [said]


class Recorder(pra.Callback):
    """Keeps the calls, with the step."""

    def __init__(self, fails=""):
        self.calls = []
        self.fails = fails

    def note(self, hook, trainer, row=None):
        self.calls.append((hook, trainer.step))
        if row:
            row["mine"] = 7.0
        assert hook != "sample" or trainer.picture("samples").exists()
        if hook == self.fails:
            raise RuntimeError("the user's mistake")

    on_start = functools.partialmethod(note, "start")
    on_step = functools.partialmethod(note, "step")
    on_log = functools.partialmethod(note, "log")
    on_checkpoint = functools.partialmethod(note, "checkpoint")
    on_sample = functools.partialmethod(note, "sample")
    on_end = functools.partialmethod(note, "end")

    def close(self):
        self.calls.append(("close", -1))


def test_callbacks_hooks_come_in_order_and_change_no_weight(straight, tmp_path):
    recorder, run = Recorder(), tmp_path / "run"
    config = tiny("train.steps=3", "train.log_every=2", "train.checkpoint_every=2", "train.sample_every=2")
    train(config, run, callbacks=[recorder])
    assert recorder.calls == [
        ("start", 0), ("step", 1), ("step", 2), ("log", 2), ("checkpoint", 2), ("sample", 2), ("step", 3), ("log", 3),
        ("checkpoint", 3), ("sample", 3), ("end", 3), ("close", -1),
    ]  # fmt: skip
    assert [row["mine"] for row in read_metrics(run)] == [7.0, 7.0]
    recorder.calls.clear()
    train(config, run, callbacks=[recorder])
    assert recorder.calls == [("end", 3), ("close", -1)]
    assert_same(run, straight, 3)


@pytest.mark.parametrize(("hook", "saved"), [("start", 1), ("log", 1), ("sample", 1), ("end", 3)])
def test_callbacks_exception_ends_the_run_after_saving(tmp_path, hook, saved):
    run, recorder = tmp_path / "run", Recorder(fails=hook)
    config = tiny("train.steps=3", "train.checkpoint_every=1", f"train.sample_every={int(hook == 'sample')}")
    with pytest.raises(RuntimeError, match="the user's mistake") as raised:
        train(config, run, callbacks=[recorder])
    assert "note" in [entry.name for entry in raised.traceback]
    assert [hook for hook, _ in recorder.calls].count(hook) == 1
    assert recorder.calls[-1] == ("close", -1)
    assert checkpoints(run)[-1].name == f"step-{saved:08d}"
    assert read_metrics(run)[-1]["step"] == saved
    train(apply_settings(config, ["train.sample_every=0"]), run)
    assert steps_logged(run) == [1, 2, 3]


class FailsInTheSecond(pra.Callback):
    def on_step(self, trainer):
        if trainer.world.rank == 1:
            raise RuntimeError("the user's mistake")


def fail(rank, folder):
    """One of two processes, the second of which has a callback that fails."""
    try:
        train(tiny("train.steps=4"), folder, callbacks=[FailsInTheSecond()])
    except (RuntimeError, pra.PraError) as error:
        folder.with_name(f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def test_callbacks_exception_in_one_process_ends_all(tmp_path):
    assert api(2, fail, tmp_path / "run") == [0, 0]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000001"]
    assert (tmp_path / "1.txt").read_text() == "RuntimeError: the user's mistake"
    assert "another process failed at step 1" in (tmp_path / "0.txt").read_text()


def test_callbacks_other_objects_are_refused(tmp_path):
    refused(lambda: train(tiny(), tmp_path / "run", callbacks=[print]), "pra.Callback", value=repr(print))


def kept_to_length(folder, monkeypatch, seconds, minutes=1.0):
    """Run 10 steps planned at 5 s each for some minutes; a step takes ``seconds(step)``; return the steps done."""
    clock, count, passes = [0.0], itertools.count(1), loop.Step.passes

    def slow(self, *given):
        clock[0] += seconds(next(count))
        return passes(self, *given)

    monkeypatch.setattr(loop.Step, "passes", slow)
    monkeypatch.setattr(callbacks, "monotonic", lambda: clock[0])
    config = tiny("train.steps=10", "train.optimizer.warmup_steps=3", "train.optimizer.schedule=cosine")
    length = callbacks.Length(minutes, lambda step: int(0.85 * 60 * minutes / step))
    parts = (torch.device("cpu"), World(), None, None, [], False, length)
    return loop.Trainer(config, folder, *parts).run().steps, clock[0] / 60


@pytest.mark.parametrize(("seconds", "steps"), [(10, 5), (3.5, 14)])
def test_length_is_planned_again_and_recorded(tmp_path, monkeypatch, capsys, seconds, steps):
    """The machine became busier after the timing, or less busy: the record gives the same training from its start."""
    taken, minutes = kept_to_length(tmp_path / "run", monkeypatch, lambda step: seconds)
    told = capsys.readouterr().out
    assert f"takes {seconds:.3g} s now" in told
    assert f"10 steps become {steps}, for 1 minutes" in told
    assert taken == steps
    assert 0.8 < minutes < 1.2
    config = read_run(tmp_path / "run")
    assert config.train.steps == steps
    train(config, tmp_path / "again")
    assert_same(tmp_path / "run", tmp_path / "again")


def test_length_that_nearly_holds_changes_nothing(tmp_path, monkeypatch):
    """The first step may compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "a state dimension varies little")
        warnings.filterwarnings("ignore", module="torch")
        assert kept_to_length(tmp_path / "run", monkeypatch, lambda step: 15 if step == 1 else 5.4)[0] == 10


def test_length_that_will_not_hold_is_told_with_numbers(tmp_path, monkeypatch):
    """The warning comes once, as early as possible."""
    with pytest.warns(UserWarning, match=r"about 1\.4 minutes, not 1: .*--steps 5") as caught:
        assert kept_to_length(tmp_path / "run", monkeypatch, lambda step: 5 if step < 5 else 20)[0] == 10
    assert len([one for one in caught if "will take" in str(one.message)]) == 1


def test_wandb_gets_metrics_pictures_and_resumes(tmp_path, monkeypatch):
    from pra.training.wandb import WandB

    wandb = Mock(Image=lambda path: f"image {path}")
    wandb.init.return_value.id = "abc123"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in (2, 3):
        config = tiny(f"train.steps={steps}", "train.sample_every=2")
        train(config, tmp_path / "run", callbacks=[WandB(project="faces")])
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert (first["project"], first["config"]["train"]["steps"]) == ("faces", 2)
    assert (second["id"], second["resume"]) == ("abc123", "allow")
    lines = [(call.kwargs["step"], call.args[0]) for call in wandb.init.return_value.log.call_args_list]
    assert [step for step, _ in lines] == [1, 2, 2, 3, 3]
    assert lines[0][1]["flow"] == read_metrics(tmp_path / "run")[0]["flow"]
    assert lines[2][1]["samples"].endswith("samples/step-00000002.png")
    assert wandb.init.return_value.finish.call_count == 2


def test_wandb_missing_is_refused(monkeypatch):
    from pra.training.wandb import WandB

    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(WandB, "wandb", code="not-installed")


def test_samples_that_are_not_finite_are_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"no samples are drawn at step 1: .* not finite"):
        train(tiny("train.steps=1", "train.sample_every=1", "sampling.guidance=1e300"), tmp_path / "run")
