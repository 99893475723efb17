"""Kill a run with kill -9 at random moments: it ends bitwise equal to a run that was left alone.

    python benchmarks/preempt.py                                 # 20 kills of a tiny model on the CPU
    python benchmarks/preempt.py --processes 2 1                 # two processes, then one, then two ...
    python benchmarks/preempt.py --processes 2 --parallel fsdp
    python benchmarks/preempt.py --source wds --workers 2        # WebDataset shards, read by worker processes
    python benchmarks/preempt.py --source hf --workers 2         # a Hugging Face data set, streamed

A kill hits one of the processes, and the others end by themselves, or all of them at once. Looked at are: after every
kill the newest checkpoint; the samples that the steps were given, as every process notes them when it gets them; at the
end the losses of every step and every tensor of the last checkpoint, beside those of a run that nobody killed. Sums of
two processes round otherwise than those of one: that run has as many processes in every step as the killed one had in
the attempt that counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file

from pra import recipe
from pra.data import open_source
from pra.data.pack import Packing, pack
from pra.models import weights
from pra.utils.files import write_atomically
from pra.utils.provenance import environment

CONTEXT = multiprocessing.get_context("forkserver")  # what it imports once, every process has
CONTEXT.set_forkserver_preload(
    ["pra.cli", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard", "sklearn.datasets"]
)
BATCH = recipe("tiny").train.batch_size
Process = multiprocessing.process.BaseProcess


@dataclass(frozen=True)
class Job:
    """A training of the recipe ``tiny``; ``processes`` are those of the first start, of the second, ... in turn."""

    steps: int
    processes: tuple[int, ...] = (1,)
    parallel: str = "ddp"
    data: str = "digits"
    workers: int = 0


@dataclass(frozen=True)
class Attempt:
    """The record of one start of a job: by how many processes, and which samples its steps were given."""

    processes: int
    samples: Counter[int]

    @property
    def start(self) -> int:
        """First step of the attempt, counted from 0."""
        return min(self.samples) // BATCH


def main(
    kills: int = 20,
    processes: tuple[int, ...] = (1,),
    parallel: Literal["ddp", "fsdp"] = "ddp",
    source: Literal["digits", "wds", "hf"] = "digits",
    workers: int = 0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Trains with kills and without, and compares. The exit status is 1 where something differs.

    Args:
        kills: Number of kills.
        processes: Processes that train, at the first start, the second, ... in turn.
        parallel: Parallelism of several processes.
        source: Source of the digits: scikit-learn, WebDataset shards, or streamed parquet files.
        workers: Processes that prepare data, for each process that trains.
        seed: Seed of the moments of the kills.
        out: File for the results, as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        os.environ["XDG_CACHE_HOME"] = str(Path(folder, "cache"))
        job = Job(20 * kills, processes, parallel, WRITERS[source](Path(folder, "data")), workers)
        killed, left_alone = Path(folder, "killed"), Path(folder, "left-alone")
        moments = train_under_fire(killed, job, kills, random.Random(seed))
        attempts = read_attempts(killed)
        train_alike(left_alone, job, attempts)
        wrong = wrong_samples(attempts, job.steps) + differences(left_alone, killed)
    resumed = [(b.start, a.processes, b.processes) for a, b in pairwise(attempts)]
    found = {
        "job": asdict(job) | {"data": source},
        "killed_after_steps": moments,
        "resumed_from_steps": [start for start, _, _ in resumed],
        "resumes_on_more_processes": sum(before < now for _, before, now in resumed),
        "resumes_on_fewer_processes": sum(before > now for _, before, now in resumed),
        "differences": wrong,
        "seconds": round(time.monotonic() - begin),
        **environment(),
    }
    if out is not None:
        text = json.dumps(found, indent=2) + "\n"
        write_atomically(out, lambda file: file.write(text.encode()))
    print(f"{len(moments)} kills, after steps {', '.join(map(str, moments))}; {found['seconds']} s")
    print(f"differences after {job.steps} steps: {', '.join(wrong) or 'none'}")
    raise SystemExit(bool(wrong))


# --- data ---------------------------------------------------------------------------------------------------


def write_wds(folder: Path) -> str:
    pack(open_source("digits"), folder, Packing(shard_images=200), workers=0)
    return f"wds:{folder}"


def write_hf(folder: Path) -> str:
    import datasets

    digits, files = open_source("digits"), 6
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(digits.classes))})
    for number in range(files):
        part = range(number * len(digits) // files, (number + 1) * len(digits) // files)
        columns = {"image": [digits.image(i) for i in part], "label": [int(digits.labels[i]) for i in part]}
        datasets.Dataset.from_dict(columns, kinds).to_parquet(str(folder / f"train-{number}.parquet"))
    return f"hf:{folder}?streaming=true&window=400"


WRITERS: dict[str, Callable[[Path], str]] = {"digits": lambda _: "digits", "wds": write_wds, "hf": write_hf}
"""Each writes the data into a folder, and returns their name."""


# --- training -----------------------------------------------------------------------------------------------


def train_under_fire(run: Path, job: Job, kills: int, moments: random.Random) -> list[int]:
    """Starts the run again after every kill, at last to its end; the steps after which it was killed."""
    survived = []
    for attempt in range(kills):
        wanted = logged(run) + moments.randrange(25)
        workers = start(run, job, attempt)
        while logged(run) < wanted and all(worker.is_alive() for worker in workers):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))  # anywhere in a step, or in a checkpoint that is being written
        survived.append(logged(run))
        for worker in moments.choice([*([worker] for worker in workers), workers]):
            worker.kill()
        end(workers)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged checkpoint is passed over with a warning
            weights.newest_checkpoint(run, average=None)
    train(run, job, kills)
    return survived


def train_alike(run: Path, job: Job, attempts: list[Attempt]) -> None:
    """Train without kills: each step with as many processes as in the last attempt that reached it."""
    by_step = [0] * job.steps
    for attempt in attempts:  # later attempts repeat the steps that earlier ones lost
        by_step[attempt.start :] = [attempt.processes] * (job.steps - attempt.start)
    done = 0
    for processes, steps in groupby(by_step):
        done += len(list(steps))
        train(run, Job(done, (processes,), job.parallel, job.data, job.workers), 0)


def train(run: Path, job: Job, attempt: int) -> None:
    """Train to the last step."""
    workers = start(run, job, attempt)
    end(workers)
    said = [path.read_text(errors="replace")[-2000:] for path in sorted(notes_of(run).glob("*.said"))[-len(workers) :]]
    assert all(worker.exitcode == 0 for worker in workers), "\n".join(["training failed", *said])


def start(run: Path, job: Job, attempt: int) -> list[Process]:
    """The processes of one command."""
    line = ["train", "tiny", "--run-dir", str(run), "--steps", str(job.steps), "--device", "cpu", "--data", job.data]
    own = ("sample_every=0", "log_every=1", "checkpoint_every=7", f"parallel={job.parallel}")
    for setting in (*(f"train.{setting}" for setting in own), f"data.workers={job.workers}"):
        line += ["--set", setting]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = job.processes[attempt % len(job.processes)]
    # torchrun would end these at once: here they wait for a process that was killed early.
    patience = {"PRA_RENDEZVOUS_TIMEOUT": "60"}
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **patience}
    workers: list[Process] = []
    for rank in range(count):
        variables = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        notes = notes_of(run) / f"{attempt:03}-{count}-{rank}"
        workers.append(CONTEXT.Process(target=work, args=(line, variables, notes)))
        workers[-1].start()
    return workers


def end(workers: list[Process]) -> None:
    """Waits for all."""
    for worker in workers:
        worker.join(300)
        assert worker.exitcode is not None, "a process hangs"


def work(line: list[str], variables: dict[str, str], notes: Path) -> None:
    """The work of a process, which records its samples and its output."""
    from pra.cli import main as pra
    from pra.training import loop

    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # as in a new process
    os.environ.update(variables)
    notes.parent.mkdir(parents=True, exist_ok=True)
    said = os.open(notes.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    batches = loop.batches

    def noted(*arguments: object, **options: object) -> Iterator[object]:
        with (
            notes.with_suffix(".samples").open("a", buffering=1) as file,
            closing(batches(*arguments, **options)) as stream,  # type: ignore[arg-type]
        ):
            for batch in stream:
                file.write(" ".join(map(str, batch.indices.tolist())) + "\n")
                yield batch

    loop.batches = noted  # type: ignore[assignment]
    raise SystemExit(pra(line))


# --- what came of it ----------------------------------------------------------------------------------------


def notes_of(run: Path) -> Path:
    """Return the folder in which processes record their samples."""
    return run.with_name(f"{run.name}-notes")


def logged(run: Path) -> int:
    """Steps that the run has logged."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def read_attempts(run: Path) -> list[Attempt]:
    """The starts that came to a step, in order."""
    found: dict[str, Attempt] = {}
    for path in sorted(notes_of(run).glob("*.samples")):
        number, processes, _ = path.stem.split("-")
        attempt = found.setdefault(number, Attempt(int(processes), Counter()))
        attempt.samples.update(map(int, path.read_text().split()))
    return [attempt for attempt in found.values() if attempt.samples]


def wrong_samples(attempts: list[Attempt], steps: int) -> list[str]:
    """Samples that a step lacked, had twice, or that belong to no step; of every step in the attempt that counts."""
    counted: Counter[int] = Counter()
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=True):
        until = BATCH * (following.start if following else steps)
        counted.update({g: count for g, count in attempt.samples.items() if g < until or not following})
    wrong = [g for g in range(BATCH * steps) if counted[g] != 1] + [g for g in counted if g >= BATCH * steps]
    return [f"sample {g} {counted[g]} times" for g in wrong[:10]]


def differences(one: Path, other: Path) -> list[str]:
    """List what differs in two runs."""
    wrong = [] if losses(one) == losses(other) else ["losses"]
    newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in newest]
    if newest[0].name != newest[1].name or files[0] != files[1]:
        return [*wrong, "files"]
    return wrong + [str(file) for file in files[0] if not same(newest[0] / file, newest[1] / file)]


def same(one: Path, other: Path) -> bool:
    """Compare bitwise, safetensors by their tensors: the order in the file's header is random."""
    if one.name == weights.STATE:  # so are the digests of such files
        a, b = (json.loads(path.read_text()) for path in (one, other))
        return {**a, weights.DIGESTS: None} == {**b, weights.DIGESTS: None}
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
