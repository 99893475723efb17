"""Several ``pra`` processes that share their work, as torchrun starts them: forked from a server that has imported it
all once."""

import contextlib
import dataclasses
import multiprocessing
import os
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pra.cli", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard",
        "torch._dynamo", "matplotlib.figure", "sklearn.datasets",
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a process."""

    code: int
    out: str
    error: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Processes at work, by rank."""

    processes: list[multiprocessing.process.BaseProcess]
    folder: Path

    def wait_for(self, condition, patience=120):
        """Wait until a condition holds, while all are alive."""
        deadline = time.monotonic() + patience
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.outcomes()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def outcomes(self, patience=240):
        """Waits for all."""
        for process in self.processes:
            process.join(patience)
        assert all(process.exitcode is not None for process in self.processes), "a process hangs"
        return [
            Outcome(process.exitcode, *((self.folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")))
            for rank, process in enumerate(self.processes)
        ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _begun(count, do, *arguments, variables=None):
    """``do(rank, *arguments)`` in several processes, which find each other as torchrun's do."""
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(count):
        own = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(variables or {})
        processes.append(CONTEXT.Process(target=_enter, args=(own, do, rank, *arguments)))
        processes[-1].start()
    return processes


def _enter(variables, do, *arguments):
    import torch

    os.environ.update(variables)
    torch.set_num_threads(1)
    do(*arguments)


@contextmanager
def started(folder, count, *arguments, variables=None):
    """``pra`` in several processes, with output in ``folder``. They are killed at the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = _begun(count, _work, folder, [str(argument) for argument in arguments], variables=variables)
    try:
        yield Group(processes, folder)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(folder, count, *arguments, variables=None):
    """``pra`` in several processes, to their end."""
    with started(folder, count, *arguments, variables=variables) as group:
        return group.outcomes()


def _work(rank, folder, line):
    from pra.cli import main

    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    code = main(line)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


def api(count, do, *arguments):
    """``do(rank, *arguments)`` in several processes, to their end; returns their exit codes."""
    group = _begun(count, do, *arguments)
    for process in group:
        process.join(120)
    return [process.exitcode for process in group]
