"""Studies: runs are made once, shared and resumed; tables agree with rows; bad input is one line."""

import itertools
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from support.refusal import refused

from pra.config import SamplingConfig, Solver, apply_settings
from pra.errors import PraError
from pra.evaluation.rollout_gap import inhomogeneity
from pra.recipes import distill
from pra.recipes.systems import TOLERANCE, parameters
from pra.sampling import learnt_grid
from pra.training.run import read_run
from pra.utils.provenance import environment, file_sha256
from studies import SETTINGS, STUDIES, Cell, Scale, Study, run_study
from studies.catalogue import find_study, only
from studies.command import main
from studies.ladder import EQUAL_SECONDS
from studies.measures import Gap, Quality, Reconstruction
from studies.records import read_rows
from studies.run import Workplace, run_key
from studies.settings import LONGER, SCALES, base, find_scale, find_setting

SMALL = Scale(
    name="small", width=16, depth=1, heads=1, codec_depth=1, head_depth=1, steps=2, batch_factor=1, samples=40,
    guidances=(1.0, 2.0), brief=True,
)  # fmt: skip
DIGITS = SETTINGS["digits-16"]
pytestmark = pytest.mark.usefixtures("classifiers")


@pytest.fixture(scope="module")
def made(tmp_path_factory, classifiers):
    """PRA and teacher forcing, trained and judged."""
    folder = tmp_path_factory.mktemp("made")
    go(study_of(QUALITY), folder)
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def study_of(*measures, name="systems"):
    """PRA and teacher forcing, measured so."""

    def cells(setting, scale):
        for cell in STUDIES["systems"].cells(setting, scale):
            if cell.system in ("pra", "teacher-forced"):
                kinds = [m for m in measures if cell.config.model.codec or not isinstance(m, Reconstruction)]
                yield replace(cell, measures=tuple(kinds))

    return Study(name, "?", ("digits-16",), cells)


def go(study, folder, seeds=(0,), jobs=1):
    place = Workplace(folder / "runs", torch.device("cpu"), jobs)
    run_study(study, [DIGITS], SMALL, seeds, folder / "studies", place, progress=False)
    return read_rows(folder / "studies" / study.name / "results.csv")


QUALITY = Quality(SamplingConfig(steps=1), 40)
BOTH = study_of(QUALITY, Reconstruction(40))


def test_study_is_made_once_and_goes_on(place, monkeypatch):
    with monkeypatch.context() as patch:  # several processes may measure a run, and one alone may hold it
        patch.setattr("studies.run.train", lambda *_, **__: pytest.fail("it is trained again"))
        rows = go(BOTH, place)
        assert go(BOTH, place) == rows
    assert [(row["system"], row["measured"].split()[0]) for row in rows] == [
        ("pra", "guidance=1"), ("pra", "reconstruction"), ("teacher-forced", "guidance=1"),
    ]  # fmt: skip
    for row in rows:
        assert (row["dataset"], row["steps"], row["seed"]) == ("digits", SMALL.steps * DIGITS.length, 0)
        assert row["train_seconds"] > 0
        assert abs(row["parameters"] / rows[0]["parameters"] - 1) < 0.03
    assert rows[0]["fid"] > 0
    assert 0 <= rows[0]["accuracy"] <= 1
    folder = place / "studies" / "systems"
    readme, picture = (folder / "README.md").read_text(), folder / "digits-16-small-samples.jpg"
    assert f"{rows[0]['fid']:.3f}" in readme
    assert "\npython -m studies systems --setting digits-16 --scale small --seeds 0\n" in readme
    assert (folder / "digits-16-small.png").exists()
    with Image.open(picture) as samples:
        assert samples.height == 3 * 82  # training images, PRA, teacher forcing
    assert f"({picture.name})" in readme
    run = place / "runs" / f"digits-16-{rows[0]['run']}"
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000004.png"]
    more = go(BOTH, place, seeds=(0, 1))
    assert [row for row in more if row["seed"] == 0] == rows
    assert len(more) == 2 * len(rows)
    assert next(row for row in more if row["seed"] == 1)["fid"] != rows[0]["fid"]


def test_known_figures_need_no_runs(place):
    rows = read_rows(place / "studies" / "systems" / "results.csv")
    picture = place / "studies" / "systems" / "digits-16-small-samples.jpg"
    drawn = picture.read_bytes()
    shutil.rmtree(place / "runs")
    assert go(study_of(QUALITY), place) == rows
    assert picture.read_bytes() == drawn
    other = go(study_of(QUALITY, name="token-dimension"), place)  # studies share figures
    assert [row["fid"] for row in other] == [row["fid"] for row in rows]
    assert not list((place / "runs").glob("digits-16-*"))
    picture.unlink()
    go(study_of(QUALITY), place)
    assert not picture.exists()


def distilled(setting, scale):
    """Yield a distilled run before its base run, which is sampled with a learnt grid."""
    run = base(setting, scale)
    steps = Quality(SamplingConfig(solver=Solver.SHORTCUT, steps=1), 40)
    yield Cell("pra, distilled", distill.second_head(run, "base", 2), (steps,), base=run)
    yield Cell("pra", run, (replace(QUALITY, sampling=SamplingConfig(steps=2), learnt_grid=True), QUALITY))


def test_run_may_begin_with_another(place, monkeypatch):
    monkeypatch.setattr(learnt_grid, "ROUNDS", 2)
    rows = go(Study("solver", "?", ("digits-16",), distilled), place)
    assert [(row["system"], row["solver"]) for row in rows] == [
        ("pra", "midpoint"), ("pra", "midpoint, learnt"), ("pra, distilled", "shortcut"),
    ]  # fmt: skip
    first, _, second = [place / "runs" / f"digits-16-{row['run']}" for row in rows]
    assert read_run(second).initial == str(first)
    assert rows[2]["parameters"] > rows[0]["parameters"]


@pytest.mark.slow
def test_jobs_side_by_side_change_nothing(tmp_path):
    study = Study("solver", "?", ("digits-16",), distilled)
    one, two = (go(study, tmp_path / str(jobs), (0, 1), jobs) for jobs in (1, 2))
    assert [(row["run"], row["fid"], row["accuracy"]) for row in one] == [
        (row["run"], row["fid"], row["accuracy"]) for row in two
    ]


def test_settings_are_timed_in_turn_beside_the_default(place, monkeypatch):
    monkeypatch.setattr(distill, "STEPS", 2)
    monkeypatch.setattr("studies.times.ROUNDS", 1)
    names = ["DPM, 3 steps", "distilled guidance, 1 step"]
    rows = go(only(STUDIES["pareto"], "value", names, DIGITS, SMALL), place)
    assert [row["value"] for row in rows] == names
    assert not any("time_ratio" in row for row in rows)  # there is nothing to compare them with
    rows = go(only(STUDIES["pareto"], "value", ["default"], DIGITS, SMALL), place)
    assert [(row["value"], row["evaluations"]) for row in rows] == [(names[0], 3), ("default", 10), (names[1], 1)]
    assert next(row for row in rows if row["value"] == "default")["time_ratio"] == 1
    assert all(row["seconds_per_image"] > 0 and row["time_ratio"] > 0 for row in rows)
    monkeypatch.setattr("studies.times.in_turn", lambda *_: pytest.fail("they are timed again"))
    assert go(only(STUDIES["pareto"], "value", names, DIGITS, SMALL), place) == rows
    assert "time over the default's" in (place / "studies" / "pareto" / "README.md").read_text()


def test_figures_of_another_judge_are_measured_again(place):
    rows = read_rows(place / "studies" / "systems" / "results.csv")
    [judge] = (place / "studies" / "judges").iterdir()
    assert {row["judge"] for row in rows} == {file_sha256(judge)[:12]}
    before = judge.read_bytes()
    with safe_open(judge, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
        tensors["head.weight"].mul_(1.5)  # as a fit on another machine would give
        judge.write_bytes(save(tensors, metadata=file.metadata()))
    again = go(study_of(QUALITY), place)
    assert [row["measured"] for row in again] == [row["measured"] for row in rows]
    assert {row["judge"] for row in again} == {file_sha256(judge)[:12]} != {row["judge"] for row in rows}
    judge.write_bytes(before[:100])
    refused(lambda: go(study_of(QUALITY), place), "classifier", code="unreadable", path=judge)


def test_gap_is_measured_at_each_position(place):
    rows = go(study_of(Gap(SamplingConfig(steps=1), 40), name="rollout-gap"), place)
    assert [row["position"] for row in rows if row["system"] == "pra"] == list(range(16))
    assert "input_gap" not in rows[0]
    for row in rows[1:16]:
        assert -0.1 < row["input_gap"] < 1
        assert -0.1 < row["condition_gap"] < 1
        assert row["rollout_loss"] > 0
    assert "loss on rollouts" in (place / "studies" / "rollout-gap" / "README.md").read_text()


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_built_in_every_setting(name):
    for setting, (size, scale) in itertools.product(SETTINGS.values(), SCALES.items()):
        if size != "cpu" and name != "systems":
            continue
        cells = list(STUDIES[name].cells(setting, scale))
        named = {(cell.system, cell.value) for cell in cells}
        assert len(named) == len(cells) > 1
        for cell in cells:
            assert cell.measures
            assert len({measure.key for measure in cell.measures}) == len(cell.measures)
            longer = LONGER if name == "length" and cell.value != scale.steps * setting.length else 1
            if str(cell.value).endswith(EQUAL_SECONDS):
                assert cell.config.train.steps <= scale.steps * setting.length
                continue
            assert (cell.base or cell.config).train.steps == longer * scale.steps * setting.length
            assert cell.config.train.batch_size == setting.batch_size * scale.batch_factor
        if name.startswith("systems"):
            counts = {cell.system: parameters(cell.config.model) for cell in cells}
            assert all(abs(count / counts["pra"] - 1) <= TOLERANCE for count in counts.values())


def test_the_key_of_a_run_is_what_decides_its_weights():
    run = base(DIGITS, SMALL)
    key = run_key(run)
    assert run_key(replace(run, recipe="another name")) == key
    assert run_key(apply_settings(run, ["train.log_every=1", "data.workers=2"])) == key
    for setting in ("train.seed=1", "train.steps=5", "train.rollout.t_min=0.5", "model.codec.state_dim=5"):
        assert run_key(apply_settings(run, [setting])) != key
    # Clean, Reconstructed and Parallel() hold no values that would tell them apart.
    kinds = {run_key(apply_settings(run, [f"train.rollout={kind}"])) for kind in ("Clean", "Reconstructed", "Parallel")}
    assert len(kinds) == 3


@pytest.mark.parametrize("name", STUDIES)
def test_command_at_scale_cpu_makes_one_seed(name, monkeypatch, tmp_path):
    asked = []

    def stop(study, settings, scale, seeds, *_):
        asked.append((len(settings), list(seeds)))
        raise PraError("stop")

    monkeypatch.setattr("studies.command.run_study", stop)
    settings = ",".join(STUDIES[name].settings)
    for more in ([], ["--setting", settings, "--seeds", "0-2"], ["--scale", "gpu"]):
        assert main([name, *more, "--out", str(tmp_path)]) == 2
    few, every = 2 if name == "token-dimension" else 1, len(STUDIES[name].settings)
    assert asked == [(few, [0]), (every, [0, 1, 2]), (every, [0, 1, 2])]


def test_inhomogeneity():
    a, b = torch.randn(2, 400, 2, 3, generator=torch.Generator().manual_seed(0))
    assert inhomogeneity(a, b).abs().max() < 0.01
    near, apart = inhomogeneity(a, b + torch.tensor([0.0, 100.0]).view(1, 2, 1))
    assert abs(near) < 0.01
    assert apart > 0.98
    # One dimension, unit intervals one apart: E|a-b| = 1, E|a-a'| = E|b-b'| = 1/3, so H = 2/3.
    u = torch.arange(2000).view(-1, 1, 1) / 2000
    assert inhomogeneity(u, u + 1).item() == pytest.approx(2 / 3, abs=1e-3)


def test_names_choose_systems_or_are_refused(capsys):
    cells = only(STUDIES["noise"], "system", ["pra", "input-noise-x"], DIGITS, SMALL).cells(DIGITS, SMALL)
    assert [cell.system for cell in cells] == ["pra"] * 6 + ["input-noise-x"] * 6
    for find, name, near in ((find_study, "system", "systems"), (find_setting, "fashon-64", "fashion-64")):
        refused(lambda find=find, name=name: find(name), repr(name), near)
    refused(lambda: find_scale("gpus"), "gpu")
    for words in ("systms", "systems --setting digits", "systems --jobs 0", "systems --systems prah"):
        assert main(words.split()) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert "no system 'prah'; did you mean 'pra'?" in errors[-1]
    assert all(line.startswith("pra: error: ") for line in errors)


def test_environment_names_the_program_as_typed(monkeypatch):
    for program, words in (
        ("/home/ann/pra/studies/__main__.py", ["python", "-m", "studies"]),
        ("/home/ann/pra/src/pra/__main__.py", ["pra"]),
        ("/home/ann/.venv/bin/pra", ["pra"]),
        ("train.py", ["train.py"]),
    ):
        monkeypatch.setattr("sys.argv", [program, "noise"])
        assert environment()["command"] == [*words, "noise"]


def test_module_without_a_name_lists_the_studies(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["studies/__main__.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("studies", run_name="__main__")
    assert ended.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STUDIES)


def test_probe_study_probes_each_layer_once(place):
    shutil.rmtree(place / "runs")

    def cells(setting, scale):
        for cell in STUDIES["probe"].cells(setting, replace(scale, depth=2, steps=1)):
            if cell.system in ("pra", "pixels", "jit") or cell.value == "pra":
                yield replace(cell, measures=cell.measures[:2])

    rows = go(replace(STUDIES["probe"], cells=cells), place)
    assert go(replace(STUDIES["probe"], cells=cells), place) == rows
    assert len(list((place / "runs").glob("digits-16-*"))) == 2  # PRA, its baselines beside it, and JiT
    found = [(row["system"], row.get("layer"), row.get("pooling"), row.get("time")) for row in rows]
    assert found.count(("pixels", None, None, None)) == 1
    for system in ("pra", "random"):
        assert [entry for entry in found if entry[0] == system] == [
            (system, layer, pooling, None) for layer in (1, 2) for pooling in ("both", "last", "mean")
        ]
    assert {entry[3] for entry in found if entry[0] == "jit"} == {0.5, 0.75}
    by_pixels = next(row["top1"] for row in rows if row["system"] == "pixels")
    readme = (place / "studies" / "probe" / "README.md").read_text()
    assert f"| raw pixels | {100 * by_pixels:.1f} % |" in readme
    assert "Top-1 accuracy on 80 held-out images" in readme
