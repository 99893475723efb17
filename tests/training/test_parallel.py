"""Several processes that train one model: they equal one, stop together, and resume in any number."""

import fcntl
import functools
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import preempt
import pytest
import torch
from support import processes
from support.captions import SETTINGS as SPOKEN
from support.processes import started
from support.refusal import refused
from support.training import TERMS, assert_same, pictures, steps_logged, tensors, tiny, train
from torch.distributed import HashStore

import pra
from pra.config import TrainConfig
from pra.data import loader, open_source
from pra.models import weights
from pra.training import checkpoint, loop, step
from pra.training.run import read_metrics
from pra.utils.distributed import World

CPU = torch.device("cpu")


def alone(folder, *settings, recipe="tiny", **more):
    """A run of one process."""
    return train(tiny(*settings, recipe=recipe), folder, **more).run


def line(folder, *settings):
    """The command of the same run."""
    usual = ("train.steps=2", "train.sample_every=0", "train.log_every=1")
    options = [word for setting in (*usual, *settings) for word in ("--set", setting)]
    return ["train", "tiny", "--run-dir", str(folder), "--device", "cpu", *options]


def share(rank, folder, settings, recipe, losses):
    """One of several processes that train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tiny(*settings, recipe=recipe), folder, losses=losses)


def shared(folder, *settings, recipe="tiny", losses=None):
    """A run of two processes."""
    assert processes.api(2, share, folder, settings, recipe, losses) == [0, 0]
    return folder


def assert_equal(one, other):
    """Check that two runs are equal up to rounding, which AdamW's first steps enlarge."""
    rows, others = read_metrics(one), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for a, b in zip(rows, others, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"state_std", "images_per_second"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-7), (a["step"], name)
    expected, found = models(one), models(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


def models(run):
    """Weights and averages, without the optimizer's shards."""
    return {name: tensor for name, tensor in tensors(run).items() if not name.startswith("shard-")}


ALL = (
    "train.steps=4", "train.objective.class_dropout=0.5", "train.micro_batch_size=2", "train.averages=[0.1]",
    "train.codec_warmup=2", "data.validation=0.1", "train.validate_every=2",
)  # fmt: skip
"""Features that combine: accumulation, averages, the codec's warm-up, held-out losses, and the user's terms."""
MUON = "train.optimizer.matrices=Muon"
PARTS = 'train.trainable=["backbone.*", "head.*", "codec.decoder.*"]'
DDP, FSDP, SPARED = "train.parallel=ddp", "train.parallel=fsdp", "train.activation_checkpointing=true"
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "common", "own", "losses"),
    [
        ("tiny", ALL, [DDP], TERMS),
        ("tiny", [*ALL, MUON, PARTS], [FSDP, SPARED], TERMS),
        ("tiny", ALL, [FSDP, SPARED], TERMS),
        ("tiny", [PARTS, "train.steps=4", "train.codec_warmup=2"], [DDP], None),
        ("tiny", [MUON, PARTS, "train.steps=4"], [FSDP], None),
        ("tiny", ["train.codec_warmup=3", "train.steps=20"], [FSDP], None),
        ("tiny:jit", ["train.steps=20"], [DDP], None),
        ("tiny:jit", ["train.steps=6"], [FSDP, "data.workers=1"], None),
        ("tiny:teacher-forced", [], [FSDP], None),
        ("tiny:exact", [], [FSDP], None),
        ("tiny:plus", ALL, [DDP], None),
        ("tiny:plus", ALL, [FSDP, SPARED], None),
        ("tiny", ["train.trainable=head.*"], [DDP], None),
        ("tiny", ["train.trainable=head.*"], [FSDP], None),
        ("tiny", ["train.trainable=auxiliary.*"], [FSDP], None),
        ("tiny", ["train.trainable=codec.*"], [FSDP], None),
        ("tiny", [MUON, "train.trainable=all-but-codec"], [FSDP, SPARED], None),
        ("tiny", [MUON, "train.steps=20"], [DDP], None),
        ("tiny", [MUON, "train.steps=20"], [FSDP], None),
        ("tiny:jit", [MUON], [FSDP], None),
        ("tiny", [*ALL, *SPOKEN], [DDP], None),
        ("tiny", [*SPOKEN, "train.steps=4"], [FSDP, SPARED], None),
        ("tiny", ALL, [DDP, "train.compile=true"], None),
        ("tiny", ALL, [FSDP, "train.compile=true"], None),
    ],
)
def test_two_processes_equal_one(recipe, common, own, losses, tmp_path):
    one = alone(tmp_path / "one", *common, recipe=recipe, losses=losses)
    assert_equal(one, shared(tmp_path / "two", *common, *own, recipe=recipe, losses=losses))


@pytest.mark.slow
def test_fsdp_in_bfloat16_learns_nearly_the_same(tmp_path):
    one = alone(tmp_path / "one", "train.precision=bfloat16", "train.steps=20")
    two = shared(tmp_path / "two", "train.precision=bfloat16", "train.steps=20", FSDP)
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=0.01)
    assert {tensor.dtype for tensor in models(two).values()} == {torch.float32}


def test_recomputed_blocks_change_nothing(straight, tmp_path):
    """The same bitwise, and the run resumes without recomputing."""
    alone(tmp_path / "spared", SPARED)
    alone(tmp_path / "spared", "train.steps=4")
    assert_same(straight, tmp_path / "spared", 4)


def test_from_two_processes_to_one_and_back(tmp_path):
    """Two processes of DDP and of FSDP equal one, also with Muon, frozen parts and recomputed blocks."""
    common, run = [*ALL, MUON, PARTS], tmp_path / "run"
    one = alone(tmp_path / "one", *common, "train.steps=8", losses=TERMS)
    shared(run, *common, DDP, losses=TERMS)
    alone(run, *common, "train.steps=6", losses=TERMS)
    shared(run, *common, "train.steps=8", FSDP, SPARED, losses=TERMS)
    assert len(list((run / "checkpoints" / "step-00000008" / "optimizer").glob("shard-0000*"))) == 2
    assert_equal(one, run)
    assert pra.Sampler(pra.load(run)).sample([3], [0]).shape == (1, 1, 8, 8)


def test_gradients_pass_between_processes_once_a_step(monkeypatch):
    """Gradients pass once a step, whatever the number of micro-batches."""
    passed = []

    def count(bucket):
        passed.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        monkeypatch.setattr(step, "losses_of", lambda model: lambda model, x: model(x).sum())
        shared = step.Step(model, {}, TrainConfig(steps=1, batch_size=4), CPU, World(0, 2))
        shared.loss.register_comm_hook(None, lambda state, bucket: count(bucket))
        for place in range(1, 5):
            with shared.accumulating(last=place == 4):
                shared.loss(torch.full((2, 3), float(place))).backward()
            assert len(passed) == (place == 4)
        assert sum(passed) == 8
        assert torch.equal(model.weight.grad, torch.full((2, 3), 2.0 * (1 + 2 + 3 + 4)))
    finally:
        torch.distributed.destroy_process_group()


def test_micro_batches_keep_the_global_batch():
    for batch, micro, count, expected in (
        (512, 64, 1, (64, 8)),
        (512, 64, 4, (64, 2)),
        (512, 64, 16, (32, 1)),  # a part smaller than a micro-batch
        (512, None, 4, (128, 1)),
    ):
        assert TrainConfig(steps=1, batch_size=batch, micro_batch_size=micro).micro_batches(count) == expected
    for batch, micro, count, nearest in ((512, 64, 3, "576"), (512, None, 3, "513"), (8, None, 16, "16")):
        config = TrainConfig(steps=1, batch_size=batch, micro_batch_size=micro)
        refused(lambda: config.micro_batches(count), f"batch_size {batch}", f"is {nearest}")  # noqa: B023


@contextmanager
def machines(*ranks, rest, timeout=60):
    """``torchrun`` of each of two machines, with a process of ``pra`` on it."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    head += ["--master-addr", "127.0.0.1", "--master-port", str(processes.free_port())]
    head += ["--rdzv-conf", f"timeout={timeout}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen([*head, "--node-rank", str(rank), "-m", "pra", *rest], **pipes) for rank in ranks]
    try:
        yield agents
    finally:
        for agent in agents:
            agent.terminate()  # it ends its processes; killed, it would leave them
            agent.wait(60)


@pytest.mark.slow
def test_two_machines_equal_one_with_two_processes(tmp_path):
    settings = ("train.micro_batch_size=2", "train.averages=[0.1]")
    one = shared(tmp_path / "one", *settings)
    with machines(0, 1, rest=line(tmp_path / "two", *settings)) as agents:
        said = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert said[1][0] == ""  # rank 0 prints
    assert [row["total"] for row in read_metrics(one)] == [row["total"] for row in read_metrics(tmp_path / "two")]
    found = models(tmp_path / "two")
    assert all(torch.equal(tensor, found[name]) for name, tensor in models(one).items())


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "line_of_torch"), [(0, "1/2 clients joined"), (1, "trying to connect to (127.0.0.1")])
def test_machine_that_does_not_come_ends_the_other(tmp_path, rank, line_of_torch):
    begin = time.monotonic()
    with machines(rank, rest=line(tmp_path / "run"), timeout=2) as agents:
        _, error = agents[0].communicate(timeout=120)
    assert agents[0].returncode == 1
    assert line_of_torch in error.strip().splitlines()[-1]
    assert time.monotonic() - begin < 60  # torch's own patience is 600 seconds
    assert not (tmp_path / "run").exists()


def trained_steps(run):
    return len(read_metrics(run))


def test_signal_to_one_process_stops_and_saves_all(tmp_path):
    run, command = tmp_path / "run", line(tmp_path / "run", "train.steps=100000")
    with started(tmp_path / "log", 2, *command) as group:
        group.wait_for(lambda: trained_steps(run) >= 3)
        os.kill(group.processes[1].pid or 0, signal.SIGTERM)
        first, other = group.outcomes()
    assert (first.code, other.code) == (143, 143)
    assert (other.out, other.error) == ("", "")
    reached = trained_steps(run)
    last = first.error.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"pra: stopped at step {reached}, saved in {run}")
    assert last.endswith("pra " + " ".join(command))
    assert "Traceback" not in first.error
    newest = weights.newest_checkpoint(run)
    assert newest is not None
    assert checkpoint.step_of(newest) == reached
    assert not (run / ".lock").exists()
    alone(run, f"train.steps={reached + 1}")
    assert steps_logged(run) == list(range(1, reached + 2))


@pytest.mark.parametrize(
    ("rank", "setting"), [(1, FSDP), slow(0, FSDP), slow(0, "data.workers=1")]
)  # the error that ends a process is kept until its workers have been waited for
def test_killed_process_ends_the_other(tmp_path, rank, setting):
    run = tmp_path / "run"
    with started(tmp_path / "log", 2, *line(run, "train.steps=100000", setting)) as group:
        group.wait_for(lambda: trained_steps(run) >= 2)
        group.processes[rank].kill()
        outcomes = group.outcomes(patience=60)
    assert (outcomes[rank].code, outcomes[1 - rank].code) == (-9, 2)
    assert "Traceback" not in outcomes[1 - rank].error
    if rank == 1:
        assert outcomes[0].error.splitlines()[-1].startswith("pra: error: another process of this command has ended")


def hold(path, item):
    """A worker keeps a file locked as long as it lives."""
    if not HELD:
        HELD.append(path.open("w"))
        fcntl.flock(HELD[0], fcntl.LOCK_EX)


HELD = []


def feed(method, folder):
    multiprocessing.set_start_method(method, force=True)
    for _ in loader.from_workers(functools.partial(hold, folder / "held"), itertools.count(), 1):
        (folder / "fed").touch()


@pytest.mark.parametrize("method", ["fork", slow("forkserver")])
def test_workers_end_with_a_killed_process(tmp_path, method):
    process = processes.CONTEXT.Process(target=feed, args=(method, tmp_path))
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


def test_corrupt_image_of_one_process_ends_both_in_one_line(tmp_path):
    source = open_source(pictures(tmp_path / "data", "ab" * 8))
    order = loop.TrainingSet(source, (8, 8), 1, pra.recipe("tiny").data, 0)
    where = source.where(order.source_index(14))  # of the second step, in the second process's share
    Path(where).write_bytes(b"\x89PNG")
    outcomes = processes.run(tmp_path / "log", 2, *line(tmp_path / "run"), "--data", source.name)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    errors = [text for outcome in outcomes for text in outcome.error.splitlines() if "error" in text.lower()]
    assert len(errors) == 1
    assert where in errors[0]
    assert errors[0].startswith("pra: error: ")
    assert trained_steps(tmp_path / "run") == 1


def fail_in_a_worker(rank, folder):
    """One of two processes; the second one's data raise in a worker, at the second step."""

    class Share(loop.Share):
        def __getitem__(self, place):
            if rank == 1 and place >= 4:
                raise KeyError("the user's mistake")
            return super().__getitem__(place)

    multiprocessing.set_start_method("fork", force=True)
    loop.Share = Share
    try:
        train(tiny("data.workers=1", "train.steps=4"), folder)
    except (KeyError, pra.PraError) as error:
        folder.with_name(f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def test_users_exception_in_a_worker_ends_both_and_saves(tmp_path):
    assert processes.api(2, fail_in_a_worker, tmp_path / "run") == [0, 0]
    assert (tmp_path / "1.txt").read_text() == """KeyError: "the user's mistake\""""
    assert "another process failed at step 1" in (tmp_path / "0.txt").read_text()
    assert [path.name for path in weights.checkpoints(tmp_path / "run")] == ["step-00000001"]


@pytest.mark.parametrize("parallelism", [DDP, FSDP])
@pytest.mark.slow
def test_loss_that_is_not_finite_ends_all_in_one_line(tmp_path, parallelism):
    more = ("train.steps=20", "train.optimizer.lr=1e30", "train.optimizer.clip=1e30", parallelism)
    outcomes = processes.run(tmp_path / "log", 2, *line(tmp_path / "run", *more))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    (error,) = [text for outcome in outcomes for text in outcome.error.splitlines() if "pra: error" in text]
    assert "is not finite at step" in error


@pytest.mark.slow
def test_torchrun_restarts_a_job_that_lost_a_process(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(processes.free_port()), "-m", "pra"]
    command += line(run, "train.steps=200", "train.checkpoint_every=10")
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while trained_steps(run) < 25:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int((run / ".lock").read_text().split()[1]), signal.SIGKILL)
        _, error = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, error
    assert steps_logged(run) == list(range(1, 201))
    for a, b in zip(read_metrics(alone(tmp_path / "alone", "train.steps=200")), read_metrics(run), strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "job"),
    [
        (20, preempt.Job(400, workers=1)),
        (20, preempt.Job(400, (2, 1))),
        (20, preempt.Job(400, (2,), "fsdp")),
    ],
)
def test_kill_9_at_random_moments_changes_nothing(tmp_path, kills, job):
    moments = preempt.train_under_fire(tmp_path / "killed", job, kills, random.Random(1))
    assert max(moments) > 0
    attempts = preempt.read_attempts(tmp_path / "killed")
    assert attempts[-1].processes == job.processes[kills % len(job.processes)]
    preempt.train_alike(tmp_path / "alone", job, attempts)
    assert preempt.wrong_samples(attempts, job.steps) == []
    assert preempt.differences(tmp_path / "alone", tmp_path / "killed") == []


def test_preempt_finds_samples_lost_or_repeated():
    def attempt(first, end, *more):
        return preempt.Attempt(1, Counter([*range(8 * first, 8 * end), *more]))

    good = [attempt(0, 4), attempt(2, 5), attempt(5, 6)]
    assert preempt.wrong_samples(good, 6) == []
    assert preempt.wrong_samples(good, 7) == [f"sample {g} 0 times" for g in range(48, 56)]
    assert preempt.wrong_samples([attempt(0, 4), attempt(2, 5, 17), attempt(5, 6)], 6) == ["sample 17 2 times"]
    assert preempt.wrong_samples([attempt(0, 4), attempt(3, 6), attempt(2, 6)], 6) == [
        f"sample {g} 2 times" for g in range(16, 24)
    ]  # it went back behind what was saved
    assert preempt.wrong_samples([attempt(0, 2, 16)], 2) == ["sample 16 1 times"]
