"""kill -9 at random moments, again and again: the run ends as one that was left alone, to the bit.

    python benchmarks/preempt.py                               # 20 kills of a tiny model on the CPU
    python benchmarks/preempt.py --processes 2 --parallel fsdp   # of one of two processes; the other ends by itself

Compared are every tensor of the last checkpoint and the losses of every step: none is lost, none is there twice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import tempfile
import time
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file

CONTEXT = multiprocessing.get_context("forkserver")  # what it imports once, every process has
CONTEXT.set_forkserver_preload(
    ["pra.cli", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard", "sklearn.datasets"]
)
Process = multiprocessing.process.BaseProcess


def main(kills: int = 20, processes: int = 1, parallel: str = "ddp", seed: int = 0) -> None:
    """Trains twice, once with kills, and compares.

    Args:
        kills: How often.
        processes: Processes that train; one of them is killed.
        parallel: ddp or fsdp, for several processes.
        seed: Of the moments.
    """
    with tempfile.TemporaryDirectory() as folder:
        begin, steps = time.monotonic(), 20 * kills
        left_alone, killed = Path(folder, "left-alone"), Path(folder, "killed")
        train(left_alone, steps, processes, parallel)
        moments = train_under_fire(killed, steps, kills, processes, parallel, random.Random(seed))
        wrong = differences(left_alone, killed)
    print(f"{len(moments)} kills, after steps {', '.join(map(str, moments))}; {time.monotonic() - begin:.0f} s")
    print(f"differences after {steps} steps: {', '.join(wrong) or 'none'}")
    raise SystemExit(bool(wrong))


def train_under_fire(
    run: Path, steps: int, kills: int, processes: int, parallel: str, moments: random.Random
) -> list[int]:
    """Starts the run again after every kill, at last to its end; the steps after which it was killed."""
    survived = []
    for _ in range(kills):
        wanted = logged(run) + moments.randrange(25)
        workers = start(run, steps, processes, parallel)
        while logged(run) < wanted and all(worker.is_alive() for worker in workers):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))  # anywhere in a step, or in a checkpoint that is being written
        survived.append(logged(run))
        moments.choice(workers).kill()
        end(workers)
    train(run, steps, processes, parallel)
    return survived


def train(run: Path, steps: int, processes: int, parallel: str) -> None:
    """To the last step."""
    workers = start(run, steps, processes, parallel)
    end(workers)
    assert all(worker.exitcode == 0 for worker in workers), "training failed; see above"


def start(run: Path, steps: int, processes: int, parallel: str) -> list[Process]:
    """The processes of one command."""
    line = ["train", "tiny", "--run-dir", str(run), "--steps", str(steps), "--device", "cpu"]
    for setting in ("sample_every=0", "log_every=1", "checkpoint_every=7", f"parallel={parallel}"):
        line += ["--set", f"train.{setting}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers: list[Process] = []
    for rank in map(str, range(processes)):
        workers.append(CONTEXT.Process(target=work, args=(line, {**world, "RANK": rank, "LOCAL_RANK": rank})))
        workers[-1].start()
    return workers


def end(workers: list[Process]) -> None:
    """Waits for all."""
    for worker in workers:
        worker.join(300)
        assert worker.exitcode is not None, "a process hangs"


def work(line: list[str], variables: dict[str, str]) -> None:
    """What a process does, silently where it is one of those that are killed."""
    from pra.cli import main as pra

    os.environ.update(variables)
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    raise SystemExit(pra(line))


def logged(run: Path) -> int:
    """Steps that the run has logged."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two runs."""
    wrong = [] if losses(one) == losses(other) else ["losses"]
    newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in newest]
    if newest[0].name != newest[1].name or files[0] != files[1]:
        return [*wrong, "files"]
    return wrong + [str(file) for file in files[0] if not same(newest[0] / file, newest[1] / file)]


def same(one: Path, other: Path) -> bool:
    """To the bit. Of safetensors the tensors: in the file, the order of what is said about them is left to chance."""
    if one.suffix != ".safetensors":
        return one.read_bytes() == other.read_bytes()
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every line."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["total"], row["gradient_norm"]) for row in rows]


if __name__ == "__main__":
    tyro.cli(main)
