"""Processes that share ``pra eval``, as torchrun starts them: two on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.refusal import refused

from pra.commands.eval import evaluate_command
from pra.config import Precision
from pra.data import open_source
from pra.evaluation.subject import Subject, Work, open_subject
from pra.sampling.batches import join_exports
from pra.utils import distributed
from pra.utils.distributed import ALONE, World, join

CPU = torch.device("cpu")


def two(*arguments: object, cache: Path) -> list[subprocess.CompletedProcess[str]]:
    """``pra`` in two processes that share the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "XDG_CACHE_HOME": str(cache)}
    line = [sys.executable, "-m", "pra", *map(str, arguments)]
    started = [
        subprocess.Popen(
            line, env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(line, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 digits of all classes, on which a classifier is fitted at once."""
    folder, source = tmp_path_factory.mktemp("few"), open_source("digits")
    for digit in range(10):
        (folder / str(digit)).mkdir()
        for index in [int(place) for place in np.flatnonzero(np.asarray(source.labels) == digit)[:4]]:
            source.image(index).save(folder / str(digit) / f"{index}.png")
    return f"folder:{folder}"


def test_two_processes_agree_with_one(
    trained: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache1"))
    evaluate_command(
        trained, reference=few, features="classifier", num=40, reconstruction=True, export_npz=tmp_path / "b1.npz",
        export_statistics=tmp_path / "s1.npz", out=tmp_path / "o1.json", batch_size=10, device="cpu",
        settings=("sampling.steps=1",),
    )  # fmt: skip
    leader, other = two(
        "eval", trained, "--reference", few, "--features", "classifier", "--num", 40, "--reconstruction",
        "--export-npz", tmp_path / "b2.npz", "--export-statistics", tmp_path / "s2.npz", "--out", tmp_path / "o2.json",
        "--batch-size", 10, "--device", "cpu", "--set", "sampling.steps=1", cache=tmp_path / "cache2",
    )  # fmt: skip
    assert (leader.returncode, other.returncode) == (0, 0), leader.stderr + other.stderr
    assert (other.stdout, other.stderr) == ("", "")
    assert leader.stdout.splitlines()[0] == capsys.readouterr().out.splitlines()[0]
    one, shared = (json.loads((tmp_path / name).read_text()) for name in ("o1.json", "o2.json"))
    assert set(one["figures"]) == set(shared["figures"]) == {"adm", "torch-fidelity", "reconstruction"}
    for column, figures in one["figures"].items():
        missing = {name for name, value in figures.items() if value is None}
        assert missing == {name for name, value in shared["figures"][column].items() if value is None}
        for name in figures.keys() - missing:
            assert shared["figures"][column][name] == pytest.approx(figures[name], rel=1e-5, abs=1e-6), name
    assert (one["provenance"].pop("processes"), shared["provenance"].pop("processes")) == (1, 2)
    for known in (one["provenance"], shared["provenance"]):
        del known["environment"], known["date"], known["seconds"]
        del known["reference"]["sha256"]  # of sums in another order
        assert len(known["reference"]["images_sha256"]) == len(known["images_sha256"]["adm"]) == 64
    assert shared["provenance"] == one["provenance"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b1.npz", "b2.npz", "cache1", "cache2", "o1.json", "o2.json", "s1.npz", "s2.npz"
    ]  # fmt: skip
    batches, statistics = ([np.load(tmp_path / f"{kind}{n}.npz") for n in "12"] for kind in "bs")
    for key in ("arr_0", "arr_1"):
        assert np.array_equal(batches[0][key], batches[1][key])
    for key in ("mu", "sigma", "features"):
        np.testing.assert_allclose(statistics[1][key], statistics[0][key], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_one_line_for_what_all_processes_refuse(tmp_path: Path) -> None:
    outcomes = two("eval", tmp_path / "none", cache=tmp_path)
    assert [outcome.returncode for outcome in outcomes] == [2, 2], outcomes
    said = "".join(outcome.stdout + outcome.stderr for outcome in outcomes)
    assert said.splitlines() == [f"pra: error: no run, folder of pictures or .npz at {tmp_path}/none"]


@pytest.mark.slow
def test_one_line_for_what_one_process_meets(few: str, tmp_path: Path) -> None:
    """Half a picture in the second one's share: the first waits for its features."""
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        open_source(few).image(index).save(tmp_path / "pictures" / f"{index}.png")
    last = tmp_path / "pictures" / "5.png"
    last.write_bytes(last.read_bytes()[:-30])
    outcomes = two(
        "eval", tmp_path / "pictures", "--reference", few, "--features", "classifier", "--device", "cpu",
        "--export-npz", tmp_path / "b.npz", "--out", tmp_path / "o.json", cache=tmp_path / "cache",
    )  # fmt: skip
    assert [outcome.returncode for outcome in outcomes] == [2, 2], outcomes
    errors = [line for outcome in outcomes for line in outcome.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("pra: error: ")
    assert "5.png: " in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pictures"]


# --- one process --------------------------------------------------------------------------------------------


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


def opened(path: Path, processes: int) -> Subject:
    """The images of a file, as so many processes on a CPU are given them."""
    return open_subject(path, None, Work(World(0, processes), CPU, 4), Precision.AUTO, ())


def test_more_processes_than_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", np.zeros((5, 8, 8, 1), np.uint8))
    refused(lambda: opened(tmp_path / "b.npz", 6), "6 processes", "5 images", "fewer")


def test_what_ready_images_are_of_is_reported(tmp_path: Path) -> None:
    plan = {"weights": {"file": "ema.safetensors", "sha256": "12"}, "sampling": {"guidance": 2.0}}
    np.savez(tmp_path / "part.npz", np.zeros((5, 8, 8, 1), np.uint8))
    join_exports([tmp_path / "part.npz"], tmp_path / "b.npz", plan)
    assert opened(tmp_path / "b.npz", 1).provenance["made"] == plan
    assert "made" not in opened(tmp_path / "part.npz", 1).provenance
    with zipfile.ZipFile(tmp_path / "part.npz", "a") as archive:
        archive.writestr("plan.json", "{")
    refused(lambda: opened(tmp_path / "part.npz", 1), "part.npz cannot be read", "write it again")
