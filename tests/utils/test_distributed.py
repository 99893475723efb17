"""Processes that share the work of a command, as torchrun starts them."""

import os
import threading
import time
from datetime import timedelta

import pytest
import torch
from support import processes
from support.refusal import refused
from torch.distributed import HashStore, TCPStore

import pra
from pra import cli
from pra.utils import distributed
from pra.utils.distributed import ALONE, World, join

CPU = torch.device("cpu")


def test_a_single_process_is_a_world_of_one(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("no group is needed")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    for size in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with join() as world, world.first_alone():
            assert world is ALONE
            assert world.is_first
            assert world.share(7) == range(7)
            assert world.combine(3, sum) == 3
            assert world.device("cpu") == CPU


@pytest.mark.parametrize(("count", "size"), [(10, 3), (8, 8), (2, 5), (50_000, 8)])
def test_shares_are_all_of_it_once(count, size):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in (None, "cuda"):
        assert World(1, 4, 1).device(name) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    assert World(1, 4, 1).device("cpu") == CPU
    refused(lambda: World(2, 4, 2).device(None), "process 2", code="unsupported", value=2)


def enter():
    with join():
        raise AssertionError("nothing to join")


def test_join_bad_variables_are_refused(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, wrong, right in (
        ("WORLD_SIZE", ("many", "0", ""), "2"),
        ("RANK", (None, "2", "-1"), "1"),
        ("LOCAL_RANK", (None, "x"), "1"),
        ("PRA_RENDEZVOUS_TIMEOUT", ("soon", "0"), "1"),
    ):
        for value in wrong:
            if value is not None:
                monkeypatch.setenv(name, value)
            refused(enter, code="invalid", name=name, value=value)
        monkeypatch.setenv(name, right)
    refused(enter, "process 1 of 2", "MASTER_ADDR", "torchrun")
    monkeypatch.delenv("WORLD_SIZE")
    refused(enter, "torchrun", name="WORLD_SIZE", value=None)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_join_other_launchers_are_refused(monkeypatch, name):
    """Each process would train the whole run into the same folder."""
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "8")
    refused(enter, f"{name}=8", "WORLD_SIZE=1", name=name)
    for variable, value in (("WORLD_SIZE", "1"), (name, "1")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with join() as world:
                assert world == World()


def test_join_without_the_others_is_one_line(monkeypatch, capfd):
    """The line comes within the given time, without torch's long messages."""
    world = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in {**world, "PRA_RENDEZVOUS_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    refused(enter, "process 1 of 2", code="unreachable", address="127.0.0.1:9")
    assert time.monotonic() - begin < 20
    assert capfd.readouterr().err == ""


def test_join_alone_in_torchruns_store_is_one_line(tmp_path, monkeypatch, capfd):
    """torchrun keeps the store itself, so the store answers although the other processes are missing."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "PRA_RENDEZVOUS_TIMEOUT": "1"}
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert cli.main(("train", "tiny", "--run-dir", str(tmp_path / "run"), "--device", "cpu")) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith("pra: error: process 0 of 2 ")
    assert f"127.0.0.1:{store.port}" in error
    assert not (tmp_path / "run").exists()


def test_join_after_a_restart_uses_a_new_part_of_the_store():
    """The store holds what the processes before have written, and machines count their restarts for themselves."""
    store, parts = HashStore(), []

    def meet(rank):
        parts.append(distributed.own_part(store, rank, 2, timedelta(seconds=20)))

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


def late(rank, folder):
    """Two processes: the second is late for what may take long, and then for a step."""
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
def test_barrier_of_a_step_waits_less_than_patient_work(tmp_path):
    """A machine that vanishes silently would else keep the others waiting for a day."""
    processes.api(2, late, tmp_path)
    assert (tmp_path / "error-0").read_text() == distributed.LOST
