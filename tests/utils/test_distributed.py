"""Processes that share the work of a command, as torchrun starts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.refusal import refused

from pra.utils import distributed
from pra.utils.distributed import ALONE, World, join

CPU = torch.device("cpu")


def test_a_single_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
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
def test_shares_are_all_of_it_once(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in (None, "cuda"):
        assert World(1, 4, 1).device(name) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")] * 2
    assert World(1, 4, 1).device("cpu") == CPU
    refused(lambda: World(2, 4, 2).device(None), "process 2", "there are 2", "--device")


def test_variables_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter() -> None:
        with join():
            raise AssertionError("nothing to join")

    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for value in ("many", "0", ""):
        monkeypatch.setenv("WORLD_SIZE", value)
        refused(enter, f"WORLD_SIZE is {value!r}", "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(enter, "RANK is None", "torchrun")
    monkeypatch.setenv("RANK", "1")
    refused(enter, "LOCAL_RANK is None", "torchrun")
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused(enter, "process 1 of 2", "MASTER_ADDR", "torchrun")
    monkeypatch.setattr(distributed, "MEETING", distributed.timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    refused(enter, "process 1 of 2", "torchrun")
