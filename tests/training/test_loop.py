"""The training loop: the computation of a step, stopping, resuming, refusals."""

import functools
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from support.captions import SETTINGS as SPOKEN
from support.files import contents
from support.processes import started
from support.refusal import refused
from support.training import assert_same, changed_losses, edges, pictures, steps_logged, tensors, tiny, train

import pra
from pra import cli
from pra.config import apply_settings
from pra.data import open_source
from pra.method.objectives import training_losses
from pra.models import weights
from pra.training import loop, step
from pra.training.callbacks import Callback
from pra.training.checkpoint import step_of
from pra.training.run import loss_terms, points_of, read_metrics
from pra.utils.distributed import World
from pra.utils.signals import Interrupted


def reached(run):
    """Steps of the newest checkpoint; 0 without one."""
    newest = weights.newest_checkpoint(run)
    return step_of(newest) if newest else 0


def test_micro_batches_accumulate_to_the_whole_batch(straight, tmp_path):
    train(tiny("train.micro_batch_size=2", "train.log_every=2"), tmp_path / "parts")
    row, (other,) = read_metrics(straight)[0], read_metrics(tmp_path / "parts")
    for name in ("total", "pixel", "flow", "auxiliary", "gradient_norm"):
        assert other[name] == pytest.approx(row[name], rel=1e-4), name
    found = tensors(tmp_path / "parts")
    for name, tensor in tensors(straight, 2).items():
        if name.startswith("model/"):
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


def test_keys_depend_on_the_global_index_alone(tmp_path, monkeypatch):
    def keys_of(name, *settings):
        seen = []

        def spy(model, images, labels, keys, *rest):
            seen.append(keys)
            return training_losses(model, images, labels, keys, *rest)  # type: ignore[no-any-return]

        monkeypatch.setattr(step, "losses_of", lambda model: spy)
        train(tiny(*settings), tmp_path / name)
        return torch.cat(seen)

    whole = keys_of("whole")
    assert len(whole.unique()) == 16
    assert torch.equal(whole, keys_of("micro", "train.micro_batch_size=2", "data.workers=1"))
    assert torch.equal(whole, keys_of("batch", "train.steps=1", "train.batch_size=16"))
    assert not torch.isin(whole, keys_of("seed", "train.seed=1")).any()


def test_training_ignores_global_random_state_and_threads(tmp_path):
    """Signals are left alone in a thread other than the main thread too."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        worker = threading.Thread(target=train, args=(tiny("data.flip=true"), tmp_path / str(seed)))
        (worker.run if seed == 1 else worker.start)()
    worker.join()
    assert_same(tmp_path / "1", tmp_path / "2")


def test_gradients_are_clipped(tmp_path):
    """Adam's first moment after a step is ``(1 - beta1)`` times the gradient."""
    config = tiny("train.steps=1", "train.optimizer.clip=0.01", "train.precision=bfloat16")
    train(config, tmp_path / "run")
    found = tensors(tmp_path / "run")
    moments = [value for name, value in found.items() if name.endswith("/exp_avg")]
    norm = torch.cat([value.flatten() for value in moments]).norm() / (1 - config.train.optimizer.betas[0])
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert read_metrics(tmp_path / "run")[0]["gradient_norm"] > 1.0  # the norm before
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_codec_warmup_trains_the_codec_alone(tmp_path):
    """Metrics average each term over the steps that have it."""
    config = tiny("train.codec_warmup=3", "train.steps=4")
    begun = pra.PRA(config.model, seed=config.train.seed).state_dict()  # type: ignore[arg-type]
    for steps, learning in ((3, {"codec"}), (4, {"codec", "condition", "backbone", "head", "auxiliary"})):
        train(apply_settings(config, [f"train.steps={steps}"]), tmp_path / "each")
        now = pra.load(tmp_path / "each", average="raw").state_dict()
        assert {name.split(".")[0] for name in now if not torch.equal(now[name], begun[name])} == learning
    train(apply_settings(config, ["train.log_every=2"]), tmp_path / "both")
    each, both = read_metrics(tmp_path / "each"), read_metrics(tmp_path / "both")
    assert [loss_terms([row]) for row in each] == [["pixel"]] * 3 + [["pixel", "flow", "auxiliary"]]
    assert [loss_terms([row]) for row in both] == [["pixel"], ["pixel", "flow", "auxiliary"]]
    assert both[1]["flow"] == each[3]["flow"]
    assert both[1]["pixel"] == pytest.approx((each[2]["pixel"] + each[3]["pixel"]) / 2)
    assert points_of(each, "flow") == [(4, each[3]["flow"])]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), [("tiny", ()), ("tiny:plus", SPOKEN)])
def test_compiled_step_is_the_same_step(recipe, settings, tmp_path):
    """Losses and gradients are equal up to rounding. AdamW's first steps enlarge rounding in the weights."""
    rows = []
    for name in ("false", "true"):
        train(tiny(*settings, f"train.compile={name}", "train.steps=3", recipe=recipe), tmp_path / name)
        rows.append(read_metrics(tmp_path / name))
    for eager, faster in zip(*rows, strict=True):
        for figure in ("total", "pixel", "flow", "auxiliary", "gradient_norm"):
            assert faster[figure] == pytest.approx(eager[figure], rel=1e-4)


@pytest.mark.parametrize("losses", [None, {"edges": (0.0, edges)}])
def test_compiler_that_fails_warns_and_changes_nothing(straight, tmp_path, monkeypatch, losses):
    """Add a user's terms: the blocks are compiled one by one."""

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    with pytest.warns(UserWarning, match=r"train.compile failed \(.*no compiler.*\).*runs uncompiled") as caught:
        train(tiny("train.compile=true"), tmp_path / "run", losses=losses)
    assert len([warning for warning in caught if "train.compile" in str(warning.message)]) == 1
    assert_same(straight, tmp_path / "run", 2)


def test_share_holds_every_sample_once():
    """The share is complete at the ends of epochs, and for one process."""
    config, source = pra.recipe("tiny"), open_source("digits")
    arguments = (source, config.model.image_size, config.model.channels, config.data, 0)
    whole = loop.TrainingSet(*arguments)
    shares = [loop.Share(*arguments, step=8, start=4 * rank, size=4) for rank in range(2)]
    first = 8 * (len(source) // 8)
    for place in range(first // 2, first // 2 + 8):
        for rank, share in enumerate(shares):
            sample = share[place]
            wanted = place // 4 * 8 + 4 * rank + place % 4
            assert (sample.index, sample.source_index) == (wanted, whole.source_index(wanted))
            assert torch.equal(sample.image, whole[wanted].image)


def test_resume_equals_an_uninterrupted_run(straight, tmp_path):
    for steps, new, workers in ((3, 3, 0), (4, 1, 1), (6, 2, 0)):
        config = tiny(f"train.steps={steps}", "train.log_every=2", f"data.workers={workers}")
        result = train(config, tmp_path / "run")
        assert (result.run, result.steps, result.new_steps, result.skipped) == (tmp_path / "run", steps, new, 0)
        assert_same(tmp_path / "run", straight, steps)
    assert steps_logged(tmp_path / "run") == [2, 3, 4, 6]  # 3: the last step of a call is always logged
    moments = [name for name in tensors(straight) if name.startswith("shard-")]
    assert len(moments) == 3 * len(list(result.model.parameters()))
    assert pra.load(tmp_path / "run").sampling == config.sampling
    assert pra.Sampler(result.model).sample([3], [0]).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("steps", [20, 7])
def test_resume_without_new_steps_changes_nothing(run, steps):
    before = contents(run)
    result = train(tiny(f"train.steps={steps}"), run)
    assert (result.steps, result.new_steps) == (20, 0)
    assert torch.equal(result.model.auxiliary.weight, pra.load(run).auxiliary.weight)  # type: ignore[union-attr]
    assert contents(run) == before


def test_resume_refuses_renamed_classes(tmp_path):
    config = tiny("train.steps=1", f"data.source={pictures(tmp_path / 'data')}", "model.num_classes=2")
    train(config, tmp_path / "run")
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "z")
    before = contents(tmp_path / "run")
    more = apply_settings(config, ["train.steps=2"])
    refused(lambda: train(more, tmp_path / "run"), "'a'", "--run-dir", code="mismatch", value="b")
    assert contents(tmp_path / "run") == before


def test_second_training_is_refused_and_kill_9_costs_nothing(tmp_path):
    """A real process with a worker, which may outlive it; what follows equals a run without a stop."""
    run, source = tmp_path / "run", pictures(tmp_path / "data")
    settings = [f"data.source={source}", "model.num_classes=2", "train.checkpoint_every=3", "data.workers=1"]
    line = ["train", "tiny", "--data", source, "--run-dir", str(run), "--steps", "1000000", "--device", "cpu"]
    for setting in ("train.sample_every=0", "train.log_every=1", *settings[2:]):
        line += ["--set", setting]
    with started(tmp_path / "log", 1, *line) as group:
        group.wait_for(lambda: reached(run) >= 3)
        process = group.processes[0]
        refused(lambda: train(tiny(*settings), run), f"process {process.pid} on ", "--run-dir")
        assert pra.load(run).classes == ("a", "b")  # reading is free
        seen = len(steps_logged(run))
        group.wait_for(lambda: len(steps_logged(run)) > seen)
        process.kill()
        process.join()
        stopped = reached(run)
        for folder in (run, tmp_path / "straight"):
            train(tiny(*settings, f"train.steps={stopped + 2}", "train.checkpoint_every=9999"), folder)
    assert not (run / ".lock").exists()
    assert_same(run, tmp_path / "straight")
    assert steps_logged(run) == list(range(1, stopped + 3))


def interrupt(at, *signals):
    """The process gets signals while it computes the losses of step ``at`` (from 1)."""

    def change(call, losses):
        for signum in signals if call == at else ():
            signal.raise_signal(signum)
        return losses

    return changed_losses(change)


class Signals(Callback):
    """Sends signals in a hook at step ``at``; a step itself cannot be left any more then."""

    def __init__(self, hook, at, *signals):
        setattr(self, hook, lambda trainer, *_: self.send(trainer.step == at, signals))

    def send(self, now, signals):
        for signum in signals if now else ():
            signal.raise_signal(signum)


def test_signal_leaves_the_step_and_saves(straight, tmp_path, monkeypatch):
    """A step may take long, and changes nothing before its end."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(step, "losses_of", interrupt(3, signal.SIGINT))
    children = multiprocessing.active_children()
    with pytest.raises(Interrupted, match="stopped at step 2") as raised:
        train(tiny("train.steps=9", "data.workers=1"), tmp_path / "run")
    assert raised.value.signum == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert [path.name for path in weights.checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert multiprocessing.active_children() == children  # workers end although the exception is kept
    monkeypatch.undo()
    ends = Signals("on_step", 3, signal.SIGTERM)
    assert train(tiny("train.steps=3"), tmp_path / "run", callbacks=[ends]).steps == 3  # after the last, nothing
    assert_same(tmp_path / "run", straight, 3)


def test_signal_in_the_first_step_writes_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "losses_of", interrupt(1, signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped before the first step"):
        train(tiny(), tmp_path / "run")
    assert weights.checkpoints(tmp_path / "run") == []


def test_signal_after_the_log_saves_its_step(straight, tmp_path):
    ends = Signals("on_log", 2, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at step 2"):
        train(tiny("train.steps=9", "train.log_every=2"), tmp_path / "run", callbacks=[ends])
    assert_same(tmp_path / "run", straight, 2)


def test_second_ctrl_c_stops_at_once(run):
    before = contents(run / "checkpoints")
    ends = Signals("on_step", 21, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tiny("train.steps=30"), run, callbacks=[ends])
    assert contents(run / "checkpoints") == before


def data_end(monkeypatch, end):
    """``end()`` comes in place of an image from the third step on."""

    class Share(loop.Share):
        def __getitem__(self, place):
            return end() if place >= 16 else super().__getitem__(place)

    monkeypatch.setattr(loop, "Share", Share)


@pytest.mark.parametrize("workers", [0, 1])
def test_signal_while_data_are_waited_for_saves(straight, tmp_path, monkeypatch, workers):
    class Terminate(Callback):
        def on_step(self, trainer):
            if trainer.step == 2:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    data_end(monkeypatch, lambda: time.sleep(1000))
    with pytest.raises(Interrupted, match="stopped at step 2"):
        train(tiny("train.steps=9", f"data.workers={workers}"), tmp_path / "run", callbacks=[Terminate()])
    assert_same(tmp_path / "run", straight, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_fail_are_raised_after_saving(straight, tmp_path, monkeypatch, workers):
    def fail():
        raise ValueError("the user's mistake")

    data_end(monkeypatch, fail)
    with pytest.raises(ValueError, match="the user's mistake"):
        train(tiny("train.steps=9", f"data.workers={workers}"), tmp_path / "run")
    assert_same(tmp_path / "run", straight, 2)


@pytest.mark.parametrize("name", ["Validation._measured", "_samples"])
def test_signal_leaves_pictures_and_validation(straight, tmp_path, monkeypatch, name):
    """Pictures and validation may take minutes."""

    def wait(*_):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(1000)

    monkeypatch.setattr(f"pra.training.callbacks.{name}", wait)
    settings = ("train.sample_every=2", "train.validate_every=2", "data.validation=digits@test")
    with pytest.raises(Interrupted, match="stopped at step 2"):
        train(tiny("train.steps=9", *settings), tmp_path / "run")
    assert_same(tmp_path / "run", straight, 2)
    assert steps_logged(tmp_path / "run") == [1, 2]
    monkeypatch.undo()
    ends = Signals("on_step", 3, signal.SIGTERM)  # after the last step, no resume would measure
    train(tiny("train.steps=3", *settings), tmp_path / "run", callbacks=[ends])
    train(tiny("train.steps=3", *settings), tmp_path / "whole")
    rows, whole = (
        [{name: value for name, value in row.items() if name != "images_per_second"} for row in read_metrics(run)]
        for run in (tmp_path / "run", tmp_path / "whole")
    )
    assert rows == whole
    assert all("validation_flow" in row for row in rows[1:])


def spoiled(at):
    """The loss of step ``at`` (from 1) is not a number."""
    return changed_losses(lambda call, losses: losses._replace(total=losses.total * (math.nan if call == at else 1.0)))


@pytest.mark.parametrize("every", ["train.log_every=5", "train.sample_every=4"])
def test_loss_that_is_not_finite_saves_nothing(run, monkeypatch, every):
    before = contents(run)
    monkeypatch.setattr(step, "losses_of", spoiled(3))
    good = str(run / "checkpoints" / "step-00000020")
    config = tiny("train.steps=40", "train.checkpoint_every=10", "train.log_every=100", every)
    refused(lambda: train(config, run), "(global samples 176 to 183)", good, code="diverged", step=23)
    after = contents(run)
    for name in before:
        if name.startswith(("checkpoints", "samples", "metrics")):
            assert after[name] == before[name]
    assert after.keys() - before.keys() <= {name for name in after if name.startswith("tensorboard")}


def test_signal_does_not_save_what_is_not_finite(tmp_path, monkeypatch):
    def change(call, losses):
        if call == 3:
            signal.raise_signal(signal.SIGTERM)
        return losses._replace(total=losses.total * (math.nan if call == 2 else 1.0))

    monkeypatch.setattr(step, "losses_of", changed_losses(change))
    config = tiny("train.steps=9", "train.log_every=100")
    refused(lambda: train(config, tmp_path / "run"), "no earlier checkpoint", code="diverged", step=2)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_corrupt_images_are_refused_or_counted(tmp_path):
    source = pictures(tmp_path / "data", "ab" * 6)
    config = tiny(f"data.source={source}", "model.num_classes=2", "train.steps=3", "train.log_every=3")
    (tmp_path / "data" / "a" / "04.png").write_bytes(b"\x89PNG")
    refused(lambda: train(config, tmp_path / "run"), "04.png", "data.on_corrupt=skip")
    # The fix works on the same folder.
    result = train(apply_settings(config, ["data.on_corrupt=skip"]), tmp_path / "run")
    assert (result.steps, result.skipped) == (3, 2)  # 24 samples of 12 images
    assert read_metrics(tmp_path / "run")[-1]["skipped"] == 2


def test_data_that_do_not_fit_are_refused_before_writing(tmp_path):
    config = tiny(f"data.source={pictures(tmp_path / 'small', size=(8, 7))}", "model.num_classes=2")
    refused(lambda: train(config, tmp_path / "run"), "7x8 pixels", "data.on_small=upscale")
    config = tiny(f"data.source={pictures(tmp_path / 'data')}", "model.num_classes=1")
    refused(lambda: train(config, tmp_path / "run"), "(b)", "num_classes to 2", code="mismatch", value=1)
    for device in ("gpu", "meta", "hpu", ""):
        refused(lambda: pra.train(tiny(), tmp_path / "run", device=device), f"device {device!r}")  # noqa: B023
    assert not (tmp_path / "run").exists()


def test_checks_without_data_come_before_they_are_opened(run, tmp_path, monkeypatch, capsys):
    def too_early(spec):
        raise AssertionError(f"{spec} is opened")

    monkeypatch.setattr("pra.training.loop.open_source", too_early)
    refused(lambda: train(tiny("train.seed=1"), run), "train.seed: 0 in the run", code="mismatch", path=run)
    refused(lambda: train(tiny(), tmp_path / "new", world=World(0, 3)), "batch_size 8")
    monkeypatch.setattr("pra.commands.train.open_source", too_early)
    monkeypatch.setattr("pra.commands.train.join", lambda: nullcontext(World(0, 3)))
    assert cli.main(["train", "tiny", "--run-dir", str(tmp_path / "new"), "--device", "cpu"]) == 2
    assert "batch_size 8" in capsys.readouterr().err
    monkeypatch.setattr("pra.commands.train.join", lambda: nullcontext(World()))
    assert cli.main(["train", "tiny", "--run-dir", str(run), "--device", "cpu", "--seed", "1"]) == 2
    assert "train.seed: 0 in the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(step.Step, "passes", full)
    parts = ("4 images at a time", "cpu", "train.micro_batch_size", "activation_checkpoint")
    refused(lambda: train(tiny("train.micro_batch_size=4"), tmp_path / "run"), *parts)


def test_killed_worker_is_one_line(tmp_path, monkeypatch):
    """Kill a worker, as the system does when memory runs out."""
    monkeypatch.setattr(loop.TrainingSet, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    refused(lambda: train(tiny("data.workers=1"), tmp_path / "run"), "prepares data has died", "data.workers")


def test_lpips_is_fetched_by_one_process_first(tmp_path, monkeypatch):
    order = []

    class One(World):
        @contextmanager
        def first_alone(self):
            order.append("alone")
            yield
            order.append("all")

    def fetch(*_):
        order.append("fetch")
        return lambda reconstruction, image: (reconstruction - image).square().mean((1, 2, 3))

    monkeypatch.setattr("pra.method.perceptual.lpips_distance", fetch)
    train(tiny("train.steps=1", "train.objective.perceptual_weight=1.0"), tmp_path / "run", world=One())
    assert order == ["alone", "all", "alone", "fetch", "all"]  # the data come first


def test_open_source_replaces_the_named_one(tmp_path):
    source = open_source(pictures(tmp_path / "data"))
    config = tiny("data.source=elsewhere", "model.num_classes=2", "train.steps=3", "train.sample_every=3")
    assert train(config, tmp_path / "run", source=source).model.classes == ("a", "b")
    with Image.open(tmp_path / "run" / "reconstructions" / "step-00000003.png") as picture:
        assert picture.size[0] == 3 * picture.size[1] - 4  # 6 images, theirs below
