"""Extension without a fork: terms of the loss, callbacks, data sources and features from outside the package."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.pages import ROOT, script
from support.processes import CONTEXT, free_port
from support.refusal import refused
from torch import Tensor

import pra
from pra import cli
from pra.data import open_source
from pra.data.images import ArraySource
from pra.data.source import SOURCES, check_name
from pra.evaluation.features import REGISTRY
from pra.method import noise
from pra.method.objectives import LossInputs, LossTerm
from pra.models.weights import checkpoints
from pra.training import callbacks
from pra.training.loop import Trainer
from pra.training.plots import panels
from pra.training.run import METRICS, loss_terms, read_metrics
from pra.utils import registry

# So they may, in a few steps.
pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the steps."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)


def tiny(recipe: str = "tiny", **train: Any) -> pra.RunConfig:
    """Two steps without pictures."""
    config = pra.recipe(recipe)
    changes = {"steps": 2, "log_every": 1, "sample_every": 0} | train
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def train(config: pra.RunConfig, folder: Path, **more: Any) -> pra.Trained:
    return pra.train(config, folder, device="cpu", progress=False, **more)


def ema(folder: Path) -> dict[str, Tensor]:
    return load_file(checkpoints(folder)[-1] / "ema.safetensors")


# --- terms of the loss --------------------------------------------------------------------------------------


def edges(known: LossInputs) -> Tensor:
    """Of the decoded pixels, with a random direction of every image."""
    assert known.decoded is not None
    direction = noise.normal(noise.fold(known.keys, 99), known.decoded.shape[-1])
    return ((known.decoded - known.patches) * direction.unsqueeze(1)).square().mean()


def smooth(known: LossInputs) -> Tensor | None:
    """Only where there are conditions."""
    return None if known.conditions is None else known.conditions.float().square().mean()


TERMS: Mapping[str, LossTerm | tuple[float, Any]] = {"edges": (0.5, edges), "smooth": LossTerm(0.01, smooth)}


def test_losses_users_terms_are_in_metrics_and_total(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run", losses=TERMS)
    rows = read_metrics(tmp_path / "run")
    assert loss_terms(rows) == ["pixel", "flow", "auxiliary", "edges", "smooth"]
    for row in rows:
        parts = row["pixel"] + row["flow"] + 0.1 * row["auxiliary"] + 0.5 * row["edges"] + 0.01 * row["smooth"]
        assert row["total"] == pytest.approx(parts, rel=1e-5)
    assert list(panels(rows, tiny().train.objective))[3:5] == ["edges", "smooth"]


def test_losses_term_changes_weights_and_zero_does_not(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "plain")
    train(tiny(), tmp_path / "zero", losses={"edges": (0.0, edges)})
    train(tiny(), tmp_path / "edges", losses={"edges": (1.0, edges)})
    plain, zero, other = (ema(tmp_path / name) for name in ("plain", "zero", "edges"))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_losses_users_terms_resume_bitwise(tmp_path: Path) -> None:
    train(tiny(steps=4), tmp_path / "straight", losses=TERMS)
    for steps in (2, 4):
        train(tiny(steps=steps), tmp_path / "resumed", losses=TERMS)
    straight, resumed = ema(tmp_path / "straight"), ema(tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_losses_resume_without_them_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(), run, losses=TERMS)
    for losses in (None, {"edges": (0.1, edges), "smooth": (0.01, smooth)}):
        refused(lambda losses=losses: train(tiny(steps=3), run, losses=losses), "has been trained with", "'edges': 0.5")
    train(tiny(), tmp_path / "plain")
    refused(lambda: train(tiny(steps=3), tmp_path / "plain", losses=TERMS), "losses={}, not {'edges': 0.5")


def test_losses_term_of_jit_sees_images_only(tmp_path: Path) -> None:
    seen: list[LossInputs] = []

    def term(known: LossInputs) -> Tensor:
        seen.append(known)
        return next(iter(known.model.parameters())).square().mean()

    train(tiny("tiny:jit", steps=1), tmp_path / "run", losses={"weights": (0.1, term)})
    assert (seen[0].states, seen[0].decoded, seen[0].conditions) == (None, None, None)
    assert seen[0].patches.shape[0] == seen[0].images.shape[0] == len(seen[0].labels)


def test_losses_term_of_none_is_left_out_in_warmup(tmp_path: Path) -> None:
    train(tiny(codec_warmup=1), tmp_path / "run", losses=TERMS)
    first, second = read_metrics(tmp_path / "run")
    assert ("smooth" in first, "smooth" in second) == (False, True)


@pytest.mark.parametrize(
    ("losses", "parts"),
    [
        ({"flow": (1.0, edges)}, ("'flow'", "the name is taken")),
        ({"gradient_norm": (1.0, edges)}, ("'gradient_norm'", "the name is taken")),
        ({"validation_flow": (1.0, edges)}, ("the name is taken",)),
        ({"a b": (1.0, edges)}, ("'a b'", "not an identifier")),
        ({"edges": edges}, ("'edges'", "expected (weight, function)")),
        ({"edges": (1.0, 2.0)}, ("expected (weight, function)",)),
        ({"edges": (math.inf, edges)}, ("weight inf", "not a finite number")),
        ({"edges": ("1", edges)}, ("weight '1'",)),
    ],
)
def test_losses_bad_terms_are_refused(tmp_path: Path, losses: Any, parts: tuple[str, ...]) -> None:
    refused(lambda: train(tiny(), tmp_path / "run", losses=losses), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [torch.zeros(2), 0.5])
def test_losses_term_that_is_not_a_scalar_is_refused(tmp_path: Path, value: Any) -> None:
    refused(
        lambda: train(tiny(), tmp_path / "run", losses={"edges": (1.0, lambda known: value)}),
        "loss term 'edges': expected a scalar tensor",
    )


def _join_environment(rank: int, port: int) -> None:
    """Become one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def _share(rank: int, port: int, folder: Path, parallel: str) -> None:
    """One of two processes that train with the terms."""
    _join_environment(rank, port)
    config = pra.config.override(tiny(codec_warmup=1), "train.parallel", parallel)
    pra.train(config, folder, device="cpu", progress=False, losses=TERMS)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_losses_two_processes_equal_one(tmp_path: Path, parallel: str) -> None:
    port = free_port()
    group = [CONTEXT.Process(target=_share, args=(rank, port, tmp_path / "two", parallel)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [process.exitcode for process in group] == [0, 0]
    train(tiny(codec_warmup=1), tmp_path / "one", losses=TERMS)
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert {name: two[name] for name in ("total", *loss_terms([one]))} == pytest.approx(
            {name: one[name] for name in ("total", *loss_terms([one]))}, rel=1e-4
        )


def test_losses_with_compile_change_only_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def compiled(function: Any, *_: str) -> Any:
        made.append(function.__name__)
        return function

    monkeypatch.setattr("pra.training.parallel.compiled", compiled)
    train(tiny(steps=1, compile=True), tmp_path / "run", losses=TERMS)
    assert set(made) == {"forward"}


# --- callbacks ----------------------------------------------------------------------------------------------


class Recorder(pra.Callback):
    """Keeps what was called, with the step."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, int]] = []
        self.fails = fails

    def _note(self, hook: str, trainer: Trainer) -> None:
        self.calls.append((hook, trainer.step))
        if hook == self.fails:
            raise RuntimeError("the user's mistake")

    def on_start(self, trainer: Trainer) -> None:
        self._note("start", trainer)

    def on_step(self, trainer: Trainer) -> None:
        self._note("step", trainer)

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        row["mine"] = 7.0
        self._note("log", trainer)

    def on_checkpoint(self, trainer: Trainer) -> None:
        self._note("checkpoint", trainer)

    def on_sample(self, trainer: Trainer) -> None:
        assert trainer.picture("samples").exists()
        self._note("sample", trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._note("end", trainer)

    def close(self) -> None:
        self.calls.append(("close", -1))


def test_callbacks_hooks_come_in_their_order(tmp_path: Path) -> None:
    recorder = Recorder()
    config = tiny(steps=3, log_every=2, checkpoint_every=2, sample_every=2)
    train(config, tmp_path / "run", callbacks=[recorder])
    assert recorder.calls == [
        ("start", 0), ("step", 1), ("step", 2), ("log", 2), ("checkpoint", 2), ("sample", 2), ("step", 3), ("log", 3),
        ("checkpoint", 3), ("sample", 3), ("end", 3), ("close", -1),
    ]  # fmt: skip
    assert [row["mine"] for row in read_metrics(tmp_path / "run")] == [7.0, 7.0]
    recorder.calls.clear()
    train(config, tmp_path / "run", callbacks=[recorder])
    assert recorder.calls == [("end", 3), ("close", -1)]


@pytest.mark.parametrize(
    ("hook", "saved"), [("start", 1), ("step", 1), ("log", 2), ("checkpoint", 2), ("sample", 2), ("end", 4)]
)
def test_callbacks_exception_ends_the_run_after_saving(tmp_path: Path, hook: str, saved: int) -> None:
    run, recorder = tmp_path / "run", Recorder(fails=hook)
    config = tiny(steps=4, checkpoint_every=1, sample_every=1 if hook == "sample" else 0)
    with pytest.raises(RuntimeError, match="the user's mistake") as raised:
        train(config, run, callbacks=[recorder])
    assert "_note" in [entry.name for entry in raised.traceback]
    assert [hook for hook, _ in recorder.calls].count(hook) == 1
    assert recorder.calls[-1] == ("close", -1)
    assert checkpoints(run)[-1].name == f"step-{saved:08d}"
    assert read_metrics(run)[-1]["step"] == saved
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, sample_every=0)), run)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4]


class FailsInTheSecond(pra.Callback):
    def on_step(self, trainer: Trainer) -> None:
        if trainer.world.rank == 1:
            raise RuntimeError("the user's mistake")


def _fail(rank: int, port: int, folder: Path) -> None:
    """One of two processes, the second of which has a callback that fails."""
    _join_environment(rank, port)
    try:
        pra.train(tiny(steps=4), folder, device="cpu", progress=False, callbacks=[FailsInTheSecond()])
    except (RuntimeError, pra.PraError) as error:
        folder.with_name(f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def test_callbacks_exception_in_one_process_ends_all(tmp_path: Path) -> None:
    port = free_port()
    group = [CONTEXT.Process(target=_fail, args=(rank, port, tmp_path / "run")) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000001"]
    assert (tmp_path / "1.txt").read_text() == "RuntimeError: the user's mistake"
    assert "a callback failed in another process at step 1" in (tmp_path / "0.txt").read_text()


def test_callbacks_other_objects_are_refused(tmp_path: Path) -> None:
    refused(lambda: train(tiny(), tmp_path / "run", callbacks=[print]), "is not a pra.Callback")


def test_callbacks_do_not_change_what_is_learnt(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "plain")
    train(tiny(), tmp_path / "watched", callbacks=[Recorder()])
    plain, watched = ema(tmp_path / "plain"), ema(tmp_path / "watched")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert json.loads((tmp_path / "watched" / METRICS).read_text().splitlines()[0])["mine"] == 7.0


# --- data sources and features ------------------------------------------------------------------------------

EXAMPLES = sorted((ROOT / "examples" / "extend").glob("*.py"))


@pytest.fixture(autouse=True)
def no_names_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that a test registers are forgotten after it."""
    for registered in (REGISTRY, SOURCES):
        monkeypatch.setattr(registered, "registered", {})


def grey(name: str, argument: str) -> ArraySource:
    count = int(argument or 4)
    return ArraySource(name, np.full((count, 8, 8), 128, np.uint8), np.zeros(count, np.int64), ("grey",))


def test_sources_registered_name_opens_with_argument() -> None:
    pra.register_source("plain", grey)
    assert [len(open_source(name)) for name in ("plain", "plain:7")] == [4, 7]
    assert open_source("plain:7").name == "plain:7"


def test_sources_unknown_name_lists_registered_ones() -> None:
    pra.register_source("plain", grey)
    refused(lambda: check_name("plane:3"), "'plane:3' is unknown", "did you mean 'plain'", "folder", "digits")


@pytest.mark.parametrize("name", ["folder", "digits", "emoji", "hf"])
def test_sources_built_in_names_stay(name: str) -> None:
    refused(lambda: pra.register_source(name, grey), f"data source '{name}' is built in")


def test_sources_bad_registrations_are_refused() -> None:
    refused(lambda: pra.register_source("a:b", grey), "'a:b'", "malformed")
    refused(lambda: pra.register_source("mine", 3), "3 is not callable")  # type: ignore[arg-type]
    pra.register_source("wrong", lambda name, argument: 3)  # type: ignore[arg-type,return-value]
    refused(lambda: open_source("wrong:1"), "'wrong:1'", "3 is not a source")


@pytest.fixture
def entry_points(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Entry points of all groups, by name."""
    points: dict[str, Any] = {}
    monkeypatch.setattr(registry, "_entry_points", lambda group: points)
    return points


def test_sources_entry_point_is_a_source(entry_points: dict[str, Any]) -> None:
    entry_points["packaged"] = SimpleNamespace(value="package:grey", load=lambda: grey)
    refused(lambda: check_name("packagd"), "did you mean 'packaged'")
    assert len(open_source("packaged:5")) == 5


def test_sources_broken_entry_point_is_named(entry_points: dict[str, Any]) -> None:
    def load() -> None:
        raise ImportError("no module named x")

    entry_points["broken"] = SimpleNamespace(value="package:nothing", load=load)
    refused(lambda: open_source("broken:1"), "'broken'", "'package:nothing' cannot be loaded", "no module named x")


def test_features_entry_point_is_a_choice(entry_points: dict[str, Any], trained: Path, capsys: Any) -> None:
    features = script(ROOT / "examples" / "extend" / "thumbnail_features.py").Thumbnails
    entry_points["packaged-features"] = SimpleNamespace(value="package:Thumbnails", load=lambda: features)
    line = ["eval", str(trained), "--num", "16", "--reference", "digits@test", "--device", "cpu", "--features"]
    assert cli.main([*line, "packaged-features"]) == 0
    assert "features thumbnails" in capsys.readouterr().out
    assert cli.main([*line, "packagd-features"]) == 2
    assert "did you mean 'packaged-features'" in capsys.readouterr().err


def test_features_bad_registrations_are_refused(trained: Path, capsys: Any) -> None:
    refused(lambda: pra.register_features("inception", REGISTRY.added), "'inception' is built in")  # type: ignore[arg-type]
    pra.register_features("nothing", lambda weights, device: 3)  # type: ignore[arg-type,return-value]
    line = ["eval", str(trained), "--num", "16", "--reference", "digits@test", "--features", "nothing"]
    assert cli.main([*line, "--device", "cpu"]) == 2
    assert "features 'nothing': 3 is not an extractor" in capsys.readouterr().err


# --- Weights & Biases ---------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.id = settings.get("id", "abc123")
        self.settings, self.lines, self.finished = settings, [], 0  # type: ignore[var-annotated]

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that a stand-in for wandb has begun."""
    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda path: f"image {path}"))
    return runs


def test_wandb_gets_metrics_pictures_and_resumes(tmp_path: Path, wandb_runs: list[FakeRun]) -> None:
    from pra.training.wandb import WandB

    for steps in (2, 3):
        train(tiny(steps=steps, sample_every=2), tmp_path / "run", callbacks=[WandB(project="faces")])
    first, second = wandb_runs
    assert first.settings["project"] == "faces"
    assert first.settings["config"]["train"]["steps"] == 2
    assert [step for step, _ in first.lines] == [1, 2, 2]
    assert first.lines[0][1]["flow"] == read_metrics(tmp_path / "run")[0]["flow"]
    assert first.lines[2][1]["samples"].endswith("samples/step-00000002.png")
    assert (second.settings["id"], second.settings["resume"]) == ("abc123", "allow")
    assert [run.finished for run in wandb_runs] == [1, 1]


def test_wandb_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pra.training.wandb import WandB

    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(WandB, "needs wandb", "[wandb]")


# --- the examples of docs/extend.md -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edge_loss", "stripes_source", "weight_norm"])
def test_examples_train_a_run(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "extend" / f"{name}.py", tmp_path / "run"],
        capture_output=True, text=True, check=False, env=processes_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 20
    told = {"edge_loss": "edges" in rows[0], "weight_norm": "weight_norm" in rows[0] and "samples" in done.stdout}
    assert told.get(name, True)


def test_examples_features_judge_a_run(trained: Path, capsys: Any) -> None:
    example = script(ROOT / "examples" / "extend" / "thumbnail_features.py")
    with pytest.raises(SystemExit) as ended:
        example.main(str(trained))
    assert ended.value.code == 0
    assert "features thumbnails" in capsys.readouterr().out


def test_examples_are_short_and_all_quoted_by_the_page() -> None:
    page = (ROOT / "docs" / "extend.md").read_text()
    assert len(EXAMPLES) == 4
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 40
        assert f"<!-- file: examples/extend/{path.name} -->" in page


def processes_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}
