"""``pra sample`` of many images: the same on any number of processes, and gone on with after a kill."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import processes
from support.files import contents
from support.models import PIXEL, random_model
from support.refusal import refused

import pra
from pra import cli
from pra.config import Precision
from pra.models import weights
from pra.sampling.batches import NpzBatch, sampled
from pra.sampling.many import Shards, sample_many
from pra.sampling.requests import Grid, Numbered
from pra.utils.distributed import ALONE
from pra.utils.files import file_mode
from pra.utils.locks import locked
from pra.utils.pixels import to_uint8
from pra.utils.provenance import file_sha256

Pra = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Pra:
    """``pra`` in this process, on the CPU: its code, what it printed, and its last line of errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([*map(str, arguments), "--device", "cpu"])
        out, error = capsys.readouterr()
        said = [line for line in error.replace("\r", "\n").splitlines() if not line.startswith("sample:")]
        return code, out, "\n".join(line for line in said if line.strip())

    return run


def arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as found:
        return found["arr_0"], found["arr_1"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- which images -------------------------------------------------------------------------------------------


def test_a_grid_is_every_label_with_every_seed() -> None:
    grid = Grid((3, 7), (5, 6, 9))
    assert list(zip(grid.labels(range(6)), grid.seeds(range(6)), strict=True)) == [
        (label, seed) for label in (3, 7) for seed in (5, 6, 9)
    ]
    assert (grid.labels(range(2, 4)), grid.seeds(range(2, 4))) == ([3, 7], [9, 5])


def test_labels_take_turns() -> None:
    requests = Numbered(11, (4, 0, 9))
    assert requests.labels(range(5)) == [4, 0, 9, 4, 0]
    assert requests.seeds(range(8, 11)) == [8, 9, 10]
    counts = Counter(requests.labels(range(11)))
    assert max(counts.values()) - min(counts.values()) == 1


def test_random_labels_depend_on_index_and_seed_alone() -> None:
    requests = Numbered(8_000, tuple(range(10)), label_seed=1)
    labels = requests.labels(range(8_000))
    assert requests.labels(range(700, 720)) == labels[700:720]
    assert Numbered(800, tuple(range(10)), label_seed=1).labels(range(700, 720)) == labels[700:720]
    assert Numbered(800, tuple(range(10)), label_seed=2).labels(range(700, 720)) != labels[700:720]
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    # Ten binomials of mean 800 and standard deviation 27; balanced they are not.
    assert 680 < counts.min() < 800 < counts.max() < 920


# --- the same on any number of processes --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_two_processes_make_the_images_of_one(trained: Path, tmp_path: Path, call: Pra, name: str) -> None:
    """To the bit: with batches of the same images."""
    line = ["sample", trained, "--num", 22, "--random-labels", "--batch-size", 4]
    assert call(*line, "--out", tmp_path / "one" / name)[0] == 0
    two = processes.run(tmp_path / "said", 2, *line, "--device", "cpu", "--out", tmp_path / "two" / name)
    assert [outcome.code for outcome in two] == [0, 0], two
    assert (two[1].out, two[1].error) == ("", "")
    assert "22 new images" in two[0].out
    assert "on 2 processes" in two[0].out
    one, shared = tmp_path / "one" / name, tmp_path / "two" / name
    if name.endswith(".npz"):
        for mine, theirs in zip(arrays(one), arrays(shared), strict=True):
            assert np.array_equal(mine, theirs)
    else:
        assert files(one) == files(shared)
        assert len(files(one)) == 22
    assert [path.name for path in (tmp_path / "two").iterdir()] == [name]  # nothing unfinished is left


def test_they_are_the_images_that_an_evaluation_makes(trained: Path, tmp_path: Path, call: Pra) -> None:
    assert call("sample", trained, "--num", 14, "--batch-size", 5, "--out", tmp_path / "a.npz")[0] == 0
    pixels, labels = arrays(tmp_path / "a.npz")
    model = pra.load(trained)
    [whole] = sampled(pra.Sampler(model), Numbered(14, tuple(range(10))), range(14), 14)
    assert labels.tolist() == whole.labels.tolist() == [index % 10 for index in range(14)]
    expected = to_uint8(whole.images).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # in other batches, so up to rounding
    batch = NpzBatch(tmp_path / "a.npz")
    assert batch.count == 14
    newest = weights.model_folder(trained)
    made = {"file": "ema.safetensors", "sha256": file_sha256(newest / "ema.safetensors")}
    assert (batch.plan["weights"], batch.plan["images"]) == (made, Numbered(14, tuple(range(10))).to_json())
    assert batch.plan["sampling"]["guidance"] == model.sampling.guidance
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == file_mode()


def test_a_seed_means_the_same_image_in_a_grid(trained: Path, tmp_path: Path, call: Pra) -> None:
    call("sample", trained, "--num", 12, "--labels", "2,5", "--out", tmp_path / "many")
    call("sample", trained, "--labels", "5", "--seeds", "3", "--out", tmp_path / "one")
    [name] = os.listdir(tmp_path / "one")
    a, b = (np.asarray(Image.open(tmp_path / folder / name), int) for folder in ("many", "one"))
    assert np.abs(a - b).max() <= 1


# --- after a kill -------------------------------------------------------------------------------------------


def test_killed_it_makes_the_same_npz(trained: Path, tmp_path: Path, call: Pra) -> None:
    """Which is then judged: an evaluation that is killed makes no image again."""
    line = ["sample", trained, "--num", 40, "--batch-size", 1]
    out, partial = tmp_path / "out.npz", tmp_path / ".out.npz.partial"
    with processes.started(tmp_path / "said", 2, *line, "--device", "cpu", "--out", out) as group:
        deadline = time.monotonic() + 60
        while len(list(partial.glob("shard-*.npz"))) < 3:
            assert time.monotonic() < deadline, "nothing is made"
            time.sleep(0.002)
        for process in group.processes:
            process.kill()
    made = len(list(partial.glob("shard-*.npz")))
    assert 3 <= made < 40
    code, text, _ = call(*line, "--out", out)
    assert code == 0
    assert f"{40 - made} new images" in text
    assert call(*line, "--out", tmp_path / "whole.npz")[0] == 0
    for found, expected in zip(arrays(out), arrays(tmp_path / "whole.npz"), strict=True):
        assert np.array_equal(found, expected)
    assert NpzBatch(out).plan == NpzBatch(tmp_path / "whole.npz").plan
    assert not partial.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_killed_it_goes_on_and_makes_nothing_twice(trained: Path, tmp_path: Path, call: Pra, count: int) -> None:
    line = ["sample", trained, "--num", 40, "--batch-size", 1]
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with processes.started(tmp_path / "said", count, *line, "--device", "cpu", "--out", out) as group:
        deadline = time.monotonic() + 60
        while len(list(partial.glob("shard-*"))) < 3:
            assert time.monotonic() < deadline, "nothing is made"
            assert any(process.is_alive() for process in group.processes)
            time.sleep(0.002)
        for process in group.processes:
            process.kill()
    assert not out.exists()
    made = {
        picture.name: (picture.stat().st_ino, picture.stat().st_mtime_ns) for picture in partial.glob("shard-*/*.png")
    }
    assert 3 <= len(made) < 40
    (partial / ".shard-000039.partial").mkdir(exist_ok=True)  # as of a kill in the middle of a shard
    (partial / ".shard-000039.partial" / "0009-9-seed000039.png").write_bytes(b"half")
    code, text, _ = call(*line, "--out", out)
    assert code == 0
    assert f"{40 - len(made)} new images" in text
    for name, identity in made.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == identity
    assert call(*line, "--out", tmp_path / "whole")[0] == 0
    assert files(out) == files(tmp_path / "whole")
    assert not partial.exists()


def test_a_kill_while_the_shards_are_joined_does_no_harm(
    trained: Path, tmp_path: Path, call: Pra, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["sample", trained, "--num", 9, "--batch-size", 2]
    call(*line, "--out", tmp_path / "whole")
    rename, moved = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        if self.suffix == ".png":
            moved.append(self)
            if len(moved) == 4:
                raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        assert call(*line, "--out", tmp_path / "out")[0] == 130
    assert not (tmp_path / "out").exists()
    code, text, _ = call(*line, "--out", tmp_path / "out")
    assert code == 0
    assert "0 new images" in text
    assert files(tmp_path / "out") == files(tmp_path / "whole")


class Killed(Exception):  # noqa: N818
    """Stands in for a kill."""


def stopped(sampler: pra.Sampler, out: Path, count: int, batches: int, batch_size: int = 2) -> None:
    """Some shards of a set, and no more."""
    sample, calls = sampler.sample, 0

    def few(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > batches:
            raise Killed
        return sample(*arguments)  # type: ignore[arg-type]

    sampler.sample = few  # type: ignore[method-assign]
    with pytest.raises(Killed):
        many(sampler, out, count, batch_size)


def many(sampler: pra.Sampler, out: Path, count: int, batch_size: int = 2, weights: str = "a") -> int:
    requests = Numbered(count, tuple(range(5)))
    return sample_many(sampler, requests, {"sha256": weights}, out, 3, batch_size, "{}-{}".format, ALONE).new


def test_what_is_unfinished_is_of_one_request_and_one_model(tmp_path: Path) -> None:
    model, out = random_model(PIXEL), tmp_path / "out.npz"
    stopped(pra.Sampler(model), out, 10, batches=2)
    settings = pra.Sampler(model, pra.config.SamplingConfig(guidance=3.0))
    for attempt, parts in (
        (lambda: many(settings, out, 10), ["sampling.guidance 1.0, not 3.0"]),
        (lambda: many(pra.Sampler(model), out, 11), ["images.count 10, not 11"]),
        (lambda: many(pra.Sampler(model), out, 10, weights="b"), ["weights.sha256 'a', not 'b'"]),
    ):
        with pytest.raises(pra.PraError) as raised:
            attempt()
        message = str(raised.value)
        for part in [f"{tmp_path}/.out.npz.partial holds an unfinished sampling", "remove the folder", *parts]:
            assert part in message
        assert "\n" not in message
    # Another batch size is no other request: the shards stay as they were cut.
    assert many(pra.Sampler(model), out, 10, batch_size=7) == 6
    assert arrays(out)[0].shape == (10, 6, 8, 3)
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.parametrize(("name", "way_out"), [("out.png", "remove it"), ("out.npz", "write it again")])
def test_a_shard_that_a_disk_has_broken_is_named_and_can_be_made_again(name: str, way_out: str, tmp_path: Path) -> None:
    sampler, out = pra.Sampler(random_model(PIXEL)), tmp_path / name
    whole = tmp_path / f"whole-{name}"
    many(sampler, whole, 4)
    stopped(sampler, out, 4, batches=1)
    (shard,) = tmp_path.glob(f".{name}.partial/shard-*.npz")
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(pra.PraError, match=shard.name) as raised:
        many(pra.Sampler(random_model(PIXEL)), out, 4)
    assert way_out in str(raised.value)
    shard.unlink()
    many(pra.Sampler(random_model(PIXEL)), out, 4)
    assert out.read_bytes() == whole.read_bytes() if name == "out.png" else arrays(out)[0].shape[0] == 4


def test_a_set_begun_in_another_arithmetic_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was begun on a GPU is, where "auto" means bfloat16."""
    model, out = random_model(PIXEL), tmp_path / "out.npz"
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr("pra.sampling.batches.in_bfloat16", lambda device, precision: precision is Precision.AUTO)
        stopped(pra.Sampler(model), out, 10, batches=2)
    refused(lambda: many(pra.Sampler(model), out, 10), "sampling.precision 'bfloat16', not 'float32'", "repeat")
    assert many(pra.Sampler(model, precision=Precision.BFLOAT16), out, 10) == 6


def test_where_nothing_was_made_nothing_is_left_nor_compared(tmp_path: Path) -> None:
    model, out = random_model(PIXEL), tmp_path / "out"
    stopped(pra.Sampler(model), out, 10, batches=0)
    assert os.listdir(tmp_path) == []
    partial = tmp_path / ".out.partial"  # as a kill before the first shard leaves it
    partial.mkdir()
    (partial / "plan.json").write_text(json.dumps({"images_per_shard": 3, "images": {"count": 7}}))
    assert many(pra.Sampler(model), out, 10) == 10
    assert len(files(out)) == 10


def test_two_commands_do_not_write_one_output(tmp_path: Path) -> None:
    model, out = random_model(PIXEL), tmp_path / "out.npz"
    stopped(pra.Sampler(model), out, 10, batches=1)
    with locked(tmp_path / ".out.npz.partial", "filled", "wait"):
        before = contents(tmp_path)
        with pytest.raises(pra.PraError, match=r"\.out\.npz\.partial is being filled by process .* another --out"):
            many(pra.Sampler(model), out, 10)
        assert contents(tmp_path) == before
    assert many(pra.Sampler(model), out, 10) == 8
    assert os.listdir(tmp_path) == ["out.npz"]


def test_what_is_half_written_does_not_count(tmp_path: Path) -> None:
    shards = Shards(tmp_path, 10, 4, as_pictures=False)
    assert [shards.indices(number) for number in range(len(shards))] == [range(4), range(4, 8), range(8, 10)]
    for name in (".shard-000000.npz.x1y2", "shard-000002.npz"):
        (tmp_path / name).write_bytes(b"")
    assert shards.missing() == [0, 1]
    assert shards.images_there() == 2


def test_a_full_disk_is_one_line_and_no_output(tmp_path: Path, full_disk: Callable[[int], object]) -> None:
    model, out = random_model(PIXEL), tmp_path / "out.npz"
    with full_disk(600), pytest.raises(pra.PraError, match=r"shard-000000.npz cannot be written: .*nothing was left"):  # type: ignore[attr-defined]
        many(pra.Sampler(model), out, 10, batch_size=10)
    assert os.listdir(tmp_path) == []


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--num", "0"], ["--num 0 must be at least 1"]),
        (["--num", "5", "--seeds", "0-4"], ["--num 5 has the seeds 0 to 4", "leave --seeds out"]),
        (["--balanced"], ["--balanced is for --num"]),
        (["--random-labels"], ["--random-labels is for --num"]),
        (["--num", "5", "--balanced", "--random-labels"], ["exclude each other"]),
        (["--num", "5", "--label-seed", "1"], ["--label-seed is for --random-labels"]),
        (["--num", "5", "--batch-size", "0"], ["--batch-size 0 must be at least 1"]),
        (["--num", "5", "--labels", "12"], ["label 12 is out of range"]),
    ],
)
def test_bad_options(trained: Path, tmp_path: Path, call: Pra, options: list[str], parts: list[str]) -> None:
    code, _, error = call("sample", trained, *options, "--out", tmp_path / "a.npz")
    assert code == 2
    assert error.startswith("pra: error: ")
    assert "\n" not in error
    for part in parts:
        assert part in error
    assert os.listdir(tmp_path) == []


def test_one_line_for_what_all_processes_refuse(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    line = ["sample", trained, "--num", 4, "--device", "cpu", "--out", tmp_path / "out"]
    outcomes = processes.run(tmp_path / "said", 2, *line)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    said = "".join(outcome.out + outcome.error for outcome in outcomes)
    assert said.splitlines() == [f"pra: error: {tmp_path}/out exists already; choose another --out or remove it"]


# --- launch lines -------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def launch_lines() -> list[str]:
    """What the pages have to say to torchrun, continued lines joined."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.sh"))]
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in pages)
    return [" ".join(line.split()) for line in re.findall(r"torchrun (-[^`\n]*-m pra [^`\n#]*)", text)]


def test_torchrun_understands_the_launch_lines() -> None:
    """It would take ``--num`` for the beginning of ``--numa-binding``."""
    from torch.distributed.run import get_args_parser

    lines = launch_lines()
    assert len(lines) >= 6
    for line in lines:
        words = [re.sub(r"\$\w+", "1", word.strip('"')) for word in line.split()]
        parsed = get_args_parser().parse_args(words)
        assert (parsed.module, parsed.training_script) == (True, "pra"), line
        assert parsed.training_script_args[0] in cli.COMMANDS, line
