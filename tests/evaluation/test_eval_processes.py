"""Processes that share ``pra eval``, as torchrun starts them: two on the CPU."""

import json
import zipfile

import numpy as np
import pytest
import torch
from support import processes
from support.judging import noise_pictures, run_command
from support.refusal import refused

from pra.commands.eval import evaluate_command
from pra.config import Precision
from pra.data import open_source
from pra.evaluation.judging import Work, open_subject
from pra.sampling.batches import join_exports
from pra.sampling.native import SWITCH
from pra.utils.distributed import World

CPU = torch.device("cpu")


def two(*arguments, cache):
    """``pra`` in two processes that share the work."""
    return processes.run(cache / "said", 2, *arguments, variables={"XDG_CACHE_HOME": str(cache), SWITCH: "0"})


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """20 pictures of ten classes, on which a classifier is fitted at once."""
    return noise_pictures(tmp_path_factory.mktemp("few"), dict.fromkeys("0123456789", 2), (8, 8))


def test_two_processes_agree_with_one(trained, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache1"))
    monkeypatch.setenv(SWITCH, "0")  # compiling into an empty cache takes longer than all else
    run_command(
        evaluate_command, trained, reference=few, num=20, reconstruction=True, export_npz=tmp_path / "b1.npz",
        export_statistics=tmp_path / "s1.npz", out=tmp_path / "o1.json", batch_size=10, settings=("sampling.steps=1",),
    )  # fmt: skip
    leader, other = two(
        "eval", trained, "--reference", few, "--features", "classifier", "--num", 20, "--reconstruction",
        "--export-npz", tmp_path / "b2.npz", "--export-statistics", tmp_path / "s2.npz", "--out", tmp_path / "o2.json",
        "--batch-size", 10, "--device", "cpu", "--set", "sampling.steps=1", cache=tmp_path / "cache2",
    )  # fmt: skip
    assert (leader.code, other.code) == (0, 0), leader.error + other.error
    assert (other.out, other.error) == ("", "")
    assert leader.out.splitlines()[0] == capsys.readouterr().out.splitlines()[0]
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
def test_one_line_for_what_all_processes_refuse(tmp_path):
    outcomes = two("eval", tmp_path / "none", cache=tmp_path)
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    said = "".join(outcome.out + outcome.error for outcome in outcomes)
    assert said.splitlines() == [f"pra: error: {tmp_path}/none is not a run, folder of pictures or .npz. Give one"]


@pytest.mark.slow
def test_one_line_for_what_one_process_meets(few, tmp_path):
    """The second rank's share has half a picture, while the first waits for its features."""
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        open_source(few).image(index).save(tmp_path / "pictures" / f"{index}.png")
    last = tmp_path / "pictures" / "5.png"
    last.write_bytes(last.read_bytes()[:-30])
    outcomes = two(
        "eval", tmp_path / "pictures", "--reference", few, "--features", "classifier", "--device", "cpu",
        "--export-npz", tmp_path / "b.npz", "--out", tmp_path / "o.json", cache=tmp_path / "cache",
    )  # fmt: skip
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    errors = [line for outcome in outcomes for line in outcome.error.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("pra: error: ")
    assert "5.png: " in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "pictures"]


def opened(path, processes):
    """The images of a file, as so many processes on a CPU are given them."""
    return open_subject(path, None, Work(World(0, processes), CPU, 4), Precision.AUTO, ())


def test_more_processes_than_images_are_refused(tmp_path):
    np.savez(tmp_path / "b.npz", np.zeros((5, 8, 8, 1), np.uint8))
    refused(lambda: opened(tmp_path / "b.npz", 6), code="conflict", processes=6, count=5)


def test_what_ready_images_are_of_is_reported(tmp_path):
    plan = {"weights": {"file": "ema.safetensors", "sha256": "12"}, "sampling": {"guidance": 2.0}}
    np.savez(tmp_path / "part.npz", np.zeros((5, 8, 8, 1), np.uint8))
    join_exports([tmp_path / "part.npz"], tmp_path / "b.npz", plan)
    assert opened(tmp_path / "b.npz", 1).provenance["made"] == plan
    assert "made" not in opened(tmp_path / "part.npz", 1).provenance
    with zipfile.ZipFile(tmp_path / "part.npz", "a") as archive:
        archive.writestr("plan.json", "{")
    refused(lambda: opened(tmp_path / "part.npz", 1), "part.npz", "is not JSON", code="unreadable")
