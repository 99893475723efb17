"""Several processes that train one model: they equal one, stop together, and go on in any number."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import preempt
import pytest
import torch
from safetensors.torch import load_file
from support import processes
from support.processes import started
from support.refusal import refused
from torch import Tensor
from torch.distributed import HashStore, TCPStore

import pra
from pra.config import TrainConfig, apply_settings
from pra.data import loader, open_source
from pra.models import weights
from pra.training import callbacks, checkpoint, loop, parallel
from pra.training import run as runs
from pra.training.run import loss_terms, read_metrics
from pra.utils import distributed
from pra.utils.distributed import World, join

# So they may, in twenty steps.
pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")

CPU = torch.device("cpu")
SHARDS = "shard-0000*-model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the steps."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)


def settings(*more: str) -> list[str]:
    return ["train.sample_every=0", "train.log_every=1", *more]


def alone(folder: Path, *more: str, recipe: str = "tiny") -> Path:
    """A run of one process."""
    config = apply_settings(pra.recipe(recipe), settings(*more))
    pra.train(config, folder, device="cpu", progress=False)
    return folder


def line(folder: Path, *more: str, recipe: str = "tiny") -> list[str]:
    """The command of the same run."""
    options = [word for setting in settings(*more) for word in ("--set", setting)]
    return ["train", recipe, "--run-dir", str(folder), "--device", "cpu", *options]


def shared(folder: Path, *more: str, recipe: str = "tiny") -> Path:
    """A run of two processes."""
    outcomes = processes.run(folder.with_suffix(".log"), 2, *line(folder, *more, recipe=recipe))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert (outcomes[1].out, outcomes[1].error) == ("", "")
    return folder


def tensors(run: Path) -> dict[str, Tensor]:
    """Weights and their moving averages, at the end."""
    folder = sorted((run / "checkpoints").iterdir())[-1]
    files = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return {f"{name}/{key}": value for name, own in files.items() for key, value in own.items()}


def assert_equal(one: Path, other: Path) -> None:
    """Up to rounding, which AdamW's first steps enlarge."""
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for name in ("total", *loss_terms([a]), "gradient_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["step"], name)
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


# --- two equal one ------------------------------------------------------------------------------------------

DROPOUT = ("train.objective.class_dropout=0.5", "train.micro_batch_size=2", "train.averages=[0.1]")
MUON = "train.optimizer.matrices=Muon"
PARTS = 'train.trainable=["head.*", "codec.decoder.*"]'


@pytest.mark.parametrize(
    ("recipe", "common", "own"),
    [
        ("tiny", DROPOUT, ["train.parallel=ddp"]),
        ("tiny", DROPOUT, ["train.parallel=fsdp", "train.activation_checkpointing=true"]),
        ("tiny", ["train.codec_warmup=3", "train.steps=6"], ["train.parallel=ddp"]),
        pytest.param("tiny", ["train.codec_warmup=3"], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param("tiny:jit", [], ["train.parallel=ddp"], marks=pytest.mark.slow),
        pytest.param("tiny:jit", ["train.steps=6"], ["train.parallel=fsdp", "data.workers=1"], marks=pytest.mark.slow),
        pytest.param("tiny:teacher-forced", [], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param("tiny:exact", [], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        ("tiny", [MUON, "train.steps=6"], ["train.parallel=fsdp"]),
        ("tiny", [PARTS, "train.steps=6", "train.codec_warmup=2"], ["train.parallel=ddp"]),
        ("tiny", [PARTS, "train.steps=6"], ["train.parallel=fsdp"]),
        pytest.param("tiny", ["train.trainable=head.*"], ["train.parallel=ddp"], marks=pytest.mark.slow),
        pytest.param("tiny", ["train.trainable=head.*"], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param("tiny", ["train.trainable=auxiliary.*"], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param("tiny", ["train.trainable=codec.*"], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param(
            "tiny",
            [MUON, "train.trainable=all-but-codec"],
            ["train.parallel=fsdp", "train.activation_checkpointing=true"],
            marks=pytest.mark.slow,
        ),
        pytest.param("tiny", [MUON], ["train.parallel=ddp"], marks=pytest.mark.slow),
        pytest.param("tiny", [MUON], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param("tiny:jit", [MUON], ["train.parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param("tiny", DROPOUT, ["train.parallel=ddp", "train.compile=true"], marks=pytest.mark.slow),
        pytest.param("tiny", DROPOUT, ["train.parallel=fsdp", "train.compile=true"], marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(recipe: str, common: list[str], own: list[str], tmp_path: Path) -> None:
    one, two = alone(tmp_path / "one", *common, recipe=recipe), tmp_path / "two"
    assert_equal(one, shared(two, *common, *own, recipe=recipe))


@pytest.mark.slow
def test_sharded_weights_in_bfloat16_learn_nearly_the_same(tmp_path: Path) -> None:
    one = alone(tmp_path / "one", "train.precision=bfloat16")
    two = shared(tmp_path / "two", "train.precision=bfloat16", "train.parallel=fsdp")
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=0.01)
    assert {tensor.dtype for tensor in tensors(two).values()} == {torch.float32}


def test_recomputed_blocks_change_nothing(tmp_path: Path) -> None:
    """To the bit, and the run goes on without."""
    plain = alone(tmp_path / "plain", "train.steps=4")
    spared = alone(tmp_path / "spared", "train.steps=2", "train.activation_checkpointing=true")
    alone(spared, "train.steps=4")
    assert all(torch.equal(tensor, tensors(plain)[name]) for name, tensor in tensors(spared).items())


def test_every_sample_is_in_one_share_once() -> None:
    """Also over the ends of epochs, and with the images and the noise that one process has."""
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


# --- machines -----------------------------------------------------------------------------------------------


@contextmanager
def machines(*ranks: int, rest: Sequence[str], timeout: int = 60) -> Iterator[list[subprocess.Popen[str]]]:
    """``torchrun`` of each of two machines, with a process of ``pra`` on it."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    head += ["--master-addr", "127.0.0.1", "--master-port", str(processes.free_port())]
    head += ["--rdzv-conf", f"timeout={timeout}"]
    agents = [
        subprocess.Popen(
            [*head, "--node-rank", str(rank), "-m", "pra", *rest], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]  # fmt: skip
    try:
        yield agents
    finally:
        for agent in agents:
            agent.terminate()  # it ends its processes; killed, it would leave them
            agent.wait(60)


@pytest.mark.slow
def test_two_machines_equal_one_with_two_processes(tmp_path: Path) -> None:
    one = shared(tmp_path / "one", *DROPOUT)
    with machines(0, 1, rest=line(tmp_path / "two", *DROPOUT)) as agents:
        said = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert said[1][0] == ""  # the first machine's process is the one that speaks
    assert [row["total"] for row in read_metrics(one)] == [row["total"] for row in read_metrics(tmp_path / "two")]
    found = tensors(tmp_path / "two")
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors(one).items())


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "line_of_torch"), [(0, "1/2 clients joined"), (1, "trying to connect to (127.0.0.1")])
def test_a_machine_that_does_not_come(tmp_path: Path, rank: int, line_of_torch: str) -> None:
    """torchrun waits for it, as long as it is told to."""
    begin = time.monotonic()
    with machines(rank, rest=line(tmp_path / "run"), timeout=2) as agents:
        _, error = agents[0].communicate(timeout=120)
    assert agents[0].returncode == 1
    assert line_of_torch in error.strip().splitlines()[-1]
    assert time.monotonic() - begin < 60  # torch's own patience is 600 seconds
    assert not (tmp_path / "run").exists()


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [[], pytest.param([MUON], marks=pytest.mark.slow)])
def test_from_two_processes_to_one_and_back(own: list[str], tmp_path: Path) -> None:
    straight, run = alone(tmp_path / "straight", "train.steps=9", *own), tmp_path / "run"
    shared(run, "train.steps=3", "train.parallel=fsdp", *own)
    optimizer = run / "checkpoints" / "step-00000003" / "optimizer"
    assert len(list(optimizer.glob(SHARDS))) == 2
    alone(run, "train.steps=6", *own)
    shared(run, "train.steps=9", "train.parallel=ddp", *own)
    assert_equal(straight, run)
    assert pra.Sampler(pra.load(run)).sample([3], [0]).shape == (1, 1, 8, 8)


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    run = alone(tmp_path / "run", "train.steps=1")
    (shard,) = (run / "checkpoints" / "step-00000001" / "optimizer").glob(SHARDS)
    good = shard.read_bytes()
    shard.write_bytes(good.replace(b"auxiliary.weight/", b"auxiliary.waight/"))
    refused(lambda: alone(run, "train.steps=2"), str(shard.parent), "cannot be read", "another checkpoint")
    shard.write_bytes(b"\xff" * len(good))
    refused(lambda: alone(run, "train.steps=2"), str(shard.parent), "cannot be read", "another checkpoint")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of its step all the same."""
    written, original = threading.Event(), weights.write_tensors

    def slowly(*arguments: Any) -> None:
        assert written.wait(60), "training waits for the checkpoint"
        original(*arguments)

    class Metrics(callbacks.Metrics):
        def write(self, row: dict[str, float]) -> None:
            super().write(row)
            if row["step"] == 3:
                assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []
                written.set()

    monkeypatch.setattr(weights, "write_tensors", slowly)
    monkeypatch.setattr(loop, "Metrics", Metrics)
    alone(tmp_path / "run", "train.steps=5", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    monkeypatch.undo()
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    straight = alone(tmp_path / "straight", "train.steps=2")
    early = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "ema.safetensors")
    assert all(torch.equal(tensor, early[name[4:]]) for name, tensor in tensors(straight).items() if name[:4] == "ema/")


# --- stopping -----------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_and_saves_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(tmp_path / "log", 2, *line(run, "train.steps=100000")) as group:
        wait_for_steps(run, 3)
        os.kill(group.processes[1].pid or 0, signal.SIGTERM)
        leader, other = group.outcomes()
    assert (leader.code, other.code) == (143, 143)
    assert (other.out, other.error) == ("", "")
    reached = int(read_metrics(run)[-1]["step"])
    assert f"pra: stopped at step {reached}, saved in {run}; the same command goes on" in leader.error
    newest = weights.newest_checkpoint(run)
    assert newest is not None
    assert checkpoint.step_of(newest) == reached
    assert not (run / ".lock").exists()
    alone(run, f"train.steps={reached + 1}")
    assert [row["step"] for row in read_metrics(run)] == list(range(1, reached + 2))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    with started(tmp_path / "log", 2, *line(run, "train.steps=100000", "train.parallel=fsdp")) as group:
        wait_for_steps(run, 2)
        group.processes[rank].kill()
        outcomes = group.outcomes()
    assert (outcomes[rank].code, outcomes[1 - rank].code) == (-9, 2)
    assert "Traceback" not in outcomes[1 - rank].error
    if rank == 1:
        assert outcomes[0].error.splitlines()[-1] == (
            "pra: error: another process of this command has ended early; see what it says"
        )


@pytest.mark.slow
def test_a_process_that_feeds_from_workers_ends_with_the_other(tmp_path: Path) -> None:
    """The error that ends it is kept until its workers have been waited for."""
    run = tmp_path / "run"
    with started(tmp_path / "log", 2, *line(run, "train.steps=100000", "data.workers=1")) as group:
        wait_for_steps(run, 2)
        group.processes[0].kill()
        outcomes = group.outcomes(patience=60)
    assert [outcome.code for outcome in outcomes] == [-9, 2]


def _hold(path: Path, item: int) -> None:
    """A worker keeps a file locked as long as it lives."""
    if not HELD:
        HELD.append(path.open("w"))
        fcntl.flock(HELD[0], fcntl.LOCK_EX)


HELD: list[Any] = []


def _feed(method: str, folder: Path) -> None:
    multiprocessing.set_start_method(method, force=True)
    for _ in loader.from_workers(functools.partial(_hold, folder / "held"), itertools.count(), 1):
        (folder / "fed").touch()


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_end_with_a_process_that_is_killed(tmp_path: Path, method: str) -> None:
    process = processes.CONTEXT.Process(target=_feed, args=(method, tmp_path))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "fed").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    with (tmp_path / "held").open() as file:
        deadline = time.monotonic() + 3  # torch looks every 5 seconds, and with a server in vain
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "the worker lives on"
                time.sleep(0.02)


def test_a_corrupt_image_of_one_process_ends_both_in_one_line(tmp_path: Path) -> None:
    source = open_source("digits")
    for index in range(16):
        path = tmp_path / "data" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        source.image(index).save(path)
    config = pra.recipe("tiny")
    order = loop.TrainingSet(open_source(f"folder:{tmp_path / 'data'}"), (8, 8), 1, config.data, 0)
    where = order.source.where(order.source_index(14))  # of the second step, in the second process's share
    Path(where).write_bytes(b"\x89PNG")
    command = [*line(tmp_path / "run"), "--data", f"folder:{tmp_path / 'data'}"]
    outcomes = processes.run(tmp_path / "log", 2, *command)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    errors = [text for outcome in outcomes for text in outcome.error.splitlines() if "error" in text.lower()]
    assert len(errors) == 1
    assert where in errors[0]
    assert errors[0].startswith("pra: error: ")
    assert len(read_metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_in_one_line(tmp_path: Path, parallelism: str) -> None:
    more = ("train.optimizer.lr=1e30", "train.optimizer.clip=1e30", f"train.parallel={parallelism}")
    outcomes = processes.run(tmp_path / "log", 2, *line(tmp_path / "run", *more))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    errors = [text for outcome in outcomes for text in outcome.error.splitlines() if "pra: error" in text]
    assert len(errors) == 1
    assert "is not finite at step" in errors[0]


@pytest.mark.slow
def test_torchrun_starts_a_job_again_that_lost_a_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(processes.free_port()), "-m", "pra"]
    command += line(run, "train.steps=200", "train.checkpoint_every=10")
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_steps(run, 25)
        os.kill(int((run / ".lock").read_text().split()[1]), signal.SIGKILL)
        _, error = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, error
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 201))
    for a, b in zip(read_metrics(alone(tmp_path / "alone", "train.steps=200")), read_metrics(run), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=0.01)


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("kills", "job"),
    [
        (2, preempt.Job(40)),
        pytest.param(20, preempt.Job(400, workers=1), marks=pytest.mark.slow),
        pytest.param(20, preempt.Job(400, (2, 1)), marks=pytest.mark.slow),
        pytest.param(20, preempt.Job(400, (2,), "fsdp"), marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_random_moments(tmp_path: Path, kills: int, job: preempt.Job) -> None:
    moments = preempt.train_under_fire(tmp_path / "killed", job, kills, random.Random(1))
    assert max(moments) > 0
    attempts = preempt.read_attempts(tmp_path / "killed")
    assert attempts[-1].processes == job.processes[kills % len(job.processes)]
    preempt.train_alike(tmp_path / "alone", job, attempts)
    assert preempt.wrong_samples(attempts, job.steps) == []
    assert preempt.differences(tmp_path / "alone", tmp_path / "killed") == []


def test_samples_that_are_lost_or_repeated_are_found() -> None:
    def attempt(first: int, end: int, *more: int) -> preempt.Attempt:
        return preempt.Attempt(1, Counter([*range(8 * first, 8 * end), *more]))

    good = [attempt(0, 4), attempt(2, 5), attempt(5, 6)]
    assert preempt.wrong_samples(good, 6) == []
    assert preempt.wrong_samples(good, 7) == [f"sample {g} 0 times" for g in range(48, 56)]
    assert preempt.wrong_samples([attempt(0, 4), attempt(2, 5, 17), attempt(5, 6)], 6) == ["sample 17 2 times"]
    assert preempt.wrong_samples([attempt(0, 4), attempt(3, 6), attempt(2, 6)], 6) == [
        f"sample {g} 2 times" for g in range(16, 24)
    ]  # it went back behind what was saved
    assert preempt.wrong_samples([attempt(0, 2, 16)], 2) == ["sample 16 1 times"]


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "count", "expected"),
    [
        (512, 64, 1, (64, 8)),
        (512, 64, 4, (64, 2)),
        (512, 64, 8, (64, 1)),
        (512, 64, 16, (32, 1)),  # a part smaller than a micro-batch
        (512, None, 4, (128, 1)),
        (512, 64, 3, "does not divide among 3 processes in micro batches of 64; the nearest that does is 576"),
        (512, None, 3, "does not divide among 3 processes; the nearest that does is 513"),
        (8, None, 16, "the nearest that does is 16"),
    ],
)
def test_the_global_batch_is_what_was_asked_for(batch: int, micro: int | None, count: int, expected: Any) -> None:
    config = TrainConfig(steps=1, batch_size=batch, micro_batch_size=micro)
    if isinstance(expected, str):
        refused(lambda: config.micro_batches(count), f"batch_size {batch}", expected)
        return
    size, times = config.micro_batches(count)
    assert (size, times) == expected
    assert size * times * count == batch


def test_a_batch_that_does_not_divide_is_one_line_of_all_processes(tmp_path: Path) -> None:
    outcomes = processes.run(tmp_path / "log", 3, *line(tmp_path / "run"))
    assert [outcome.code for outcome in outcomes] == [2, 2, 2]
    errors = [text for outcome in outcomes for text in outcome.error.splitlines()]
    assert len(errors) == 1
    assert "batch_size 8 does not divide among 3 processes; the nearest that does is 9" in errors[0]
    assert not (tmp_path / "run").exists()


def test_variables_that_are_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter() -> None:
        with join():
            raise AssertionError("nothing to join")

    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    refused(enter, "WORLD_SIZE is None", "torchrun")
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("PRA_RENDEZVOUS_TIMEOUT", "soon")):
        monkeypatch.setenv(name, value)
    refused(enter, "PRA_RENDEZVOUS_TIMEOUT is 'soon'", "seconds")
    monkeypatch.setenv("RANK", "2")
    refused(enter, "RANK is 2, but WORLD_SIZE 2 has the ranks 0 to 1", "torchrun")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_that_says_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each process would train the whole run, all into one folder."""
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "8")
    refused(lambda: join().__enter__(), f"8 processes were started ({name})", "torchrun", "WORLD_SIZE=1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun sets it, or who wants them apart
    with join() as world:
        assert world == World()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv(name, "1")
    with join() as world:
        assert world == World()


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A line, in the time that was given, and none of torch's pages."""
    world = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in {**world, "PRA_RENDEZVOUS_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    refused(lambda: join().__enter__(), "process 1 of 2", "127.0.0.1:9", "PRA_RENDEZVOUS_TIMEOUT")
    assert time.monotonic() - begin < 20
    assert capfd.readouterr().err == ""


def test_a_process_that_torchrun_has_started_alone(tmp_path: Path) -> None:
    """torchrun keeps the store itself, so that it answers although nobody else comes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": "2", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    variables["PRA_RENDEZVOUS_TIMEOUT"] = "1"
    with started(tmp_path / "log", 1, *line(tmp_path / "run"), variables=variables) as group:
        (outcome,) = group.outcomes(patience=40)
    assert outcome.code == 2
    (error,) = outcome.error.splitlines()
    assert error.startswith(f"pra: error: process 0 of 2 does not find the others at 127.0.0.1:{store.port} (of the")
    assert "1 have not come" in error
    assert not (tmp_path / "run").exists()


def test_processes_find_each_other_after_a_restart() -> None:
    """In a store that holds what those before have written, and whose machines count their restarts for themselves."""
    store, parts = HashStore(), []

    def meet(rank: int) -> None:
        parts.append(distributed._own_part(store, rank, 2, timedelta(seconds=20)))

    for _ in range(2):
        threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)  # the first finds what the second of the attempt before has left
        for thread in threads:
            thread.join()
    assert len(parts) == 4
    for part, number in zip(parts, (0, 0, 1, 1), strict=True):
        part.add("which", number)
    assert [part.add("which", 0) for part in parts] == [0, 0, 2, 2]


def _late(rank: int, port: int, folder: Path) -> None:
    """Two processes: the second is late for what may take long, and then for a step."""
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.STEP = timedelta(seconds=1)
    with join() as world:
        time.sleep(1.5 * rank)
        world.run_on_first(lambda: 0)
        with world.first_alone():
            time.sleep(1.5 * (1 - rank))
        time.sleep(2.5 * rank)
        try:
            world.barrier()
        except pra.PraError as error:
            (folder / f"error-{rank}").write_text(str(error))
        os._exit(0)


@pytest.mark.slow
def test_a_step_waits_less_long_than_what_one_does_for_all(tmp_path: Path) -> None:
    """Else a machine that is gone without a word would keep the others for a day."""
    port = processes.free_port()
    group = [processes.CONTEXT.Process(target=_late, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert (tmp_path / "error-0").read_text() == distributed.LOST


def test_gradients_pass_between_processes_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many micro-batches it has."""
    passed: list[int] = []

    def count(bucket: Any) -> Any:
        passed.append(bucket.buffer().numel())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        shared = parallel.SharedLoss(
            model, model, lambda model, x: model(x).sum(), TrainConfig(steps=1, batch_size=4), World(0, 2), CPU, False
        )  # type: ignore[arg-type]  # any module will do
        shared.module.register_comm_hook(None, lambda state, bucket: count(bucket))
        for place in range(1, 5):
            with shared.accumulating(last=place == 4):
                shared(torch.full((2, 3), float(place))).backward()  # type: ignore[attr-defined]
            assert len(passed) == (place == 4)
        assert sum(passed) == 8
        assert torch.equal(model.weight.grad, torch.full((2, 3), 2.0 * (1 + 2 + 3 + 4)))
    finally:
        torch.distributed.destroy_process_group()


def test_machines_that_do_not_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(World):
        def combine(self, value: Any, how: Any) -> Any:
            return how(["process 7 on a machine", value])

    monkeypatch.setattr(runs, "SEEN_WITHIN", 0.0)
    runs.check_shared(tmp_path, World())
    (tmp_path / ".lock").write_text("process 7 on a machine")
    runs.check_shared(tmp_path, Elsewhere(1, 2, 0))
    (tmp_path / ".lock").write_text("process 7 on another")  # which was killed, long ago
    refused(lambda: runs.check_shared(tmp_path, Elsewhere(1, 2, 0)), "process 1", str(tmp_path), "--run-dir")
    (tmp_path / ".lock").unlink()
    refused(lambda: runs.check_shared(tmp_path, Elsewhere(1, 2, 0)), "process 7 on a machine", "share")


def test_blocks_that_cannot_be_compiled_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(forward: Any, *_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise pra.PraError("train.compile failed (no compiler)")

        return call

    monkeypatch.setattr(parallel, "compiled", compiled)
    model = pra.PRA(pra.recipe("tiny").model)
    before = dict(model.named_parameters())
    codes, patches = torch.tensor([1]), torch.zeros(1, 15, 4)
    expected = model.conditions(codes, patches)
    parallel._change_blocks(model, parallel._Compiler())
    with pytest.warns(UserWarning, match="no compiler.*goes on without") as caught:
        assert torch.equal(model.conditions(codes, patches), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.conditions(codes, patches)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_how_processes_share_a_step_may_change_on_the_way(tmp_path: Path) -> None:
    """It is no part of what is learnt."""
    run = alone(tmp_path / "run", "train.steps=1")
    alone(run, "train.steps=2", "train.parallel=fsdp", "train.activation_checkpointing=true")
    assert dataclasses.asdict(runs.read_run(run))["train"]["activation_checkpointing"]
