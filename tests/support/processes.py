"""Several ``pra`` processes that share their work, as torchrun starts them: forked from a server that has imported it
all once."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pra.cli", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard",
        "matplotlib.figure", "sklearn.datasets",
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a process."""

    code: int
    out: str
    error: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Processes at work, by rank."""

    processes: list[multiprocessing.process.BaseProcess]
    folder: Path

    def wait_for(self, condition: Callable[[], bool], patience: float = 120) -> None:
        """Wait until a condition holds, while all are alive."""
        deadline = time.monotonic() + patience
        while not condition():
            assert all(process.is_alive() for process in self.processes), self.outcomes()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def outcomes(self, patience: float = 240) -> list[Outcome]:
        """Waits for all."""
        for process in self.processes:
            process.join(patience)
        assert all(process.exitcode is not None for process in self.processes), "a process hangs"
        return [
            Outcome(process.exitcode, *((self.folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")))
            for rank, process in enumerate(self.processes)
        ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started(
    folder: Path, count: int, *arguments: object, variables: Mapping[str, str] | None = None
) -> Iterator[Group]:
    """``pra`` in so many processes; what they say goes to ``folder``. They are killed at the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [str(argument) for argument in arguments]
    processes = []
    for rank in range(count):
        own = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(variables or {})
        process = CONTEXT.Process(target=_work, args=(folder / str(rank), line, own))
        process.start()
        processes.append(process)
    try:
        yield Group(processes, folder)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(folder: Path, count: int, *arguments: object, variables: Mapping[str, str] | None = None) -> list[Outcome]:
    """``pra`` in so many processes, to their end."""
    with started(folder, count, *arguments, variables=variables) as group:
        return group.outcomes()


def _work(path: Path, line: list[str], variables: dict[str, str]) -> None:
    from pra.cli import main

    os.environ.update(variables)
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(path.with_suffix(f".{kind}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    code = main(line)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


def api(count: int, do: Callable[..., None], *arguments: object) -> list[int | None]:
    """``do(rank, *arguments)`` in so many processes that find each other as torchrun's do; their exit codes."""
    port = free_port()
    group = [CONTEXT.Process(target=_call, args=(rank, count, port, do, arguments)) for rank in range(count)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    return [process.exitcode for process in group]


def _call(rank: int, count: int, port: int, do: Callable[..., None], arguments: tuple[object, ...]) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    do(rank, *arguments)
