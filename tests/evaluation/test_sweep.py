"""`pra sweep`: what it tries, that it judges as `pra eval` does, that it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import processes
from support.models import random_model
from support.refusal import refused

import pra
from pra.commands import sweep as command
from pra.commands.eval import evaluate_command
from pra.commands.share import export_command
from pra.commands.sweep import sweep_command
from pra.config import GuidanceSchedule, SamplingConfig, Solver
from pra.errors import NotFiniteError
from pra.evaluation import classifier
from pra.evaluation.evaluate import Report
from pra.evaluation.sweep.pictures import curves as _curves
from pra.evaluation.sweep.points import Point, points
from pra.evaluation.sweep.results import Result, find_best, hints, table
from pra.sharing.push import export
from pra.utils.provenance import file_sha256
from pra.utils.signals import Interrupted

pytestmark = pytest.mark.usefixtures("classifiers")

# --- what is tried ------------------------------------------------------------------------------------------


def test_points_are_all_combinations() -> None:
    tried = points(SamplingConfig(), ["guidance=1,1.5", "solver=heun, dpm"])
    assert [point.name for point in tried] == [
        "guidance=1,solver=heun",
        "guidance=1,solver=dpm",
        "guidance=1.5,solver=heun",
        "guidance=1.5,solver=dpm",
    ]
    assert tried[2].sampling == SamplingConfig(guidance=1.5, solver=Solver.HEUN)
    assert tried[2].options == ["--guidance", "1.5", "--solver", "heun"]
    assert tried[2].settings == ["--set", "sampling.guidance=1.5", "--set", "sampling.solver=heun"]


def test_points_of_other_kinds_of_values() -> None:
    tried = points(SamplingConfig(), ["sampling.guidance_interval=[0,0.8],[0.1,1]", "renormalise=false"])
    assert [point.sampling.guidance_interval for point in tried] == [(0.0, 0.8), (0.1, 1.0)]
    assert not tried[0].sampling.renormalise
    assert tried[0].name == "guidance_interval=0,0.8,renormalise=false"
    assert tried[0].settings[1] == "sampling.guidance_interval=[0.0, 0.8]"
    schedules = points(SamplingConfig(), ["schedule=constant,linear"])
    assert [point.sampling.schedule for point in schedules] == list(GuidanceSchedule)


def test_every_digit_and_no_grid_at_all_are_written() -> None:
    near, nearer = points(SamplingConfig(), ["guidance=1.00000001,1.00000002"])
    assert (near.name, nearer.options) == ("guidance=1.00000001", ["--guidance", "1.00000002"])
    none, own = points(SamplingConfig(steps=2, times=(0.0, 0.5, 1.0)), ["times=null,[0,0.4,1]"])
    assert (none.name, none.options, none.settings) == ("times=null", [], ["--set", "sampling.times=null"])
    assert own.options == ["--times", "0,0.4,1"]


def test_one_value_written_twice_is_one_point() -> None:
    assert [point.name for point in points(SamplingConfig(), ["guidance=1,1.0,1e0,2"])] == ["guidance=1", "guidance=2"]


def test_other_steps_than_a_learnt_grid_has() -> None:
    learnt = SamplingConfig(steps=2, times=(0.0, 0.4, 1.0))
    kept, gone = points(learnt, ["steps=2,3"])
    assert (kept.sampling.times, gone.sampling.times) == (learnt.times, None)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["guidance"], ("--over 'guidance'", "KEY=VALUE")),
        (["guidance=1,,2"], ("--over 'guidance=1,,2'",)),
        (["guidance="], ("--over 'guidance='",)),
        (["guidance=1", "sampling.guidance=2"], ("names guidance twice", "guidance=1,...")),
        (["guidanse=1"], ("guidanse", "did you mean 'guidance'")),
        (["guidance=much"], ("guidance", "much")),
        (["steps=0,3"], ("steps", "0")),
        (["guidance_interval=0,0.8"], ("--over guidance_interval=0", "brackets")),
        (["steps=" + "9" * 5000], ("--over steps=",)),
        (
            [f"times=[{','.join(f'{place / 64:g}' for place in range(65))}]"],
            ("times=0,0.015625", "at most 200", "--set"),
        ),
    ],
)
def test_points_that_are_none(over: list[str], words: tuple[str, ...]) -> None:
    refused(lambda: points(SamplingConfig(), over), *words)


# --- what was found -----------------------------------------------------------------------------------------


def result(fid: float | None, **changes: Any) -> Result:
    return Result(Point(changes, SamplingConfig(**changes)), Report({"torch-fidelity": {"fid": fid, "kid": 0.1}}, {}))


def test_the_best_is_the_lowest_finite_fid() -> None:
    results = [result(3.0, guidance=1.0), result(2.0, guidance=2.0), result(2.5, guidance=3.0)]
    diverged = [result(None, guidance=9.0), result(float("nan"), guidance=12.0)]
    best = find_best(diverged + results)
    assert best is not None
    assert best.point.name == "guidance=2"
    assert find_best(diverged) is None
    shown = table(results + diverged).splitlines()
    assert [line for line in shown if "*" in line] == [line for line in shown if "guidance=2 " in line]
    assert shown[0].split() == ["fid", "kid"]  # nobody has the others
    assert shown[-1].split() == ["guidance=12", "-", "0.1"]


def test_a_best_at_the_edge_is_told() -> None:
    rising = [result(fid, guidance=scale) for scale, fid in ((1.0, 3.0), (2.0, 2.0), (3.0, 1.0))]
    assert list(hints(rising, rising[-1])) == [
        "the best guidance, 3, is the largest that was tried: a better one may lie beyond"
    ]
    assert list(hints(rising, rising[1])) == []
    assert list(hints(rising, rising[0])) == []  # 1 is no guidance at all
    assert list(hints(rising[:1], rising[0])) == []  # it was not varied
    colder = [result(fid, temperature=scale) for scale, fid in ((0.9, 1.0), (1.0, 2.0))]
    assert "smallest" in next(hints(colder, colder[0]))
    weaker = [result(fid, guidance=scale) for scale, fid in ((0.5, 2.0), (1.0, 1.0))]
    assert "largest" in next(hints(weaker, weaker[1]))
    steps = [result(fid, steps=count) for count, fid in ((2, 2.0), (5, 1.0))]
    assert list(hints(steps, steps[1])) == []  # always the most


# --- the command --------------------------------------------------------------------------------------------

OVER = ("guidance=1,2",)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for index in range(12):
            noise = random.integers(0, 256, (6, 8, 3), np.uint8)
            Image.fromarray(noise).save(folder / name / f"{index}.png")
    return f"folder:{folder}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = random_model(num_classes=2)
    model.classes = ("a", "b")
    return pra.save(model, tmp_path / "model")


def sweep(target: Path | None, out: Path | None, pictures: str, **options: Any) -> None:
    given: dict[str, Any] = {"features": "classifier", "device": "cpu", "num": 12, "settings": ("sampling.steps=1",)}
    sweep_command(target, reference=pictures, out=out, **{"over": OVER} | given | options)


def test_every_point_is_what_eval_measures(
    model: Path, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(model, tmp_path / "out", pictures)
    shown = capsys.readouterr().out
    names = ("guidance=1.json", "guidance=1.png", "guidance=2.json", "guidance=2.png", "samples.jpg", "sweep.png")
    assert tuple(sorted(path.name for path in (tmp_path / "out").iterdir())) == names
    evaluate_command(
        model, reference=pictures, features="classifier", device="cpu", num=12, out=tmp_path / "eval.json",
        settings=("sampling.steps=1", "sampling.guidance=2"),
    )  # fmt: skip
    ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "out/guidance=2.json", tmp_path / "eval.json"))
    assert ours["figures"] == theirs["figures"]
    changing = ("environment", "date", "seconds")
    assert ours["provenance"] == {k: v for k, v in theirs["provenance"].items() if k not in changing} | {
        "environment": ours["provenance"]["environment"]
    }
    assert "best by FID: guidance=" in shown
    best = shown.partition("best by FID: guidance=")[2].partition(",")[0]
    # With all that differs from how the model samples by itself, whether it was varied or not.
    assert f"next: pra sample {model} --guidance {best} --steps 1\n" in shown
    assert "12 images are few" in shown
    assert "pra export" not in shown  # it is exported already


def test_two_processes_agree_with_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run, whose folder is where it all goes."""
    sweep(run, None, "digits", num=20, over=("guidance=1.5",))
    assert f"to share it so: pra export {run} DIR --set sampling.guidance=1.5" in capsys.readouterr().out
    (run / "sweep").rename(tmp_path / "one")
    known = json.loads((tmp_path / "one/guidance=1.5.json").read_text())["provenance"]["features"]["sha256"]
    fitted = next(path for path in classifier.cache_folder().iterdir() if file_sha256(path) == known)
    leader, other = processes.run(
        tmp_path / "said", 2, "sweep", run, "--reference", "digits", "--features", "classifier",
        "--weights", fitted, "--num", 20, "--device", "cpu", "--set", "sampling.steps=1", "--over", "guidance=1.5",
    )  # fmt: skip
    assert (leader.code, other.code, other.out, other.error) == (0, 0, "", ""), leader.error
    one, two = (json.loads((home / "guidance=1.5.json").read_text()) for home in (tmp_path / "one", run / "sweep"))
    protocol = "torch-fidelity"
    assert two["figures"][protocol]["fid"] == pytest.approx(one["figures"][protocol]["fid"], rel=1e-5)
    assert two["provenance"]["images_sha256"] == one["provenance"]["images_sha256"]
    strips = [(home / "guidance=1.5.png").read_bytes() for home in (tmp_path / "one", run / "sweep")]
    assert strips[0] == strips[1]


def test_sweep_over_averages_judges_each(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one folder with a sweep of the default average, whose figures are of other weights."""
    sweep(run, None, "digits", num=20, over=("guidance=1",))
    sweep(run, None, "digits", num=20, over=("average=ema,raw", "guidance=1"))
    shown = capsys.readouterr().out
    names = ("guidance=1", "average=ema,guidance=1", "average=raw,guidance=1")
    default, ema, raw = (json.loads((run / "sweep" / f"{name}.json").read_text()) for name in names)
    assert ema["figures"] == default["figures"] != raw["figures"]
    assert [one["provenance"]["images"]["weights"] for one in (ema, raw)] == ["ema.safetensors", "model.safetensors"]
    evaluate_command(
        run, reference="digits", features="classifier", device="cpu", num=20, out=tmp_path / "raw.json", average="raw",
        settings=("sampling.steps=1", "sampling.guidance=1"),
    )  # fmt: skip
    assert json.loads((tmp_path / "raw.json").read_text())["figures"] == raw["figures"]
    best = "raw" if "best by FID: average=raw" in shown else "ema"
    assert f"next: pra sample {run} --average {best} --guidance 1 --steps 1\n" in shown
    assert f"to share it so: pra export {run} DIR --average {best} --set sampling.guidance=1 " in shown
    refused(lambda: sweep(run, None, "digits", over=("average=ema,emma",)), "no average 'emma'", "ema, raw")


def test_labels_as_in_the_reference(model: Path, pictures: str, tmp_path: Path) -> None:
    sweep(model, tmp_path / "out", pictures, labels="reference", over=("guidance=1",))
    known = json.loads((tmp_path / "out/guidance=1.json").read_text())["provenance"]["images"]
    assert known["labels"] == f"as frequent as in {pictures}, shuffled"


def test_the_strip_shows_the_first_images(model: Path, pictures: str, tmp_path: Path) -> None:
    sweep(model, tmp_path / "out", pictures, over=("guidance=2",))
    sampler = pra.Sampler(pra.load(model), steps=1, guidance=2.0)
    count = command.COLUMNS
    expected = pra.utils.pixels.contact_sheet(sampler.sample([0, 1] * (count // 2), range(count)), count)
    with Image.open(tmp_path / "out/guidance=2.png") as strip:
        assert np.array_equal(np.asarray(strip), np.asarray(expected))


def test_it_goes_on_where_it_was_stopped(
    model: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate, judged = command.evaluate, []

    def stopping(*arguments: Any, **options: Any) -> Report:
        judged.append(options["provenance"]["images"]["sampling"]["guidance"])
        if len(judged) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(command, "evaluate", stopping)
    with pytest.raises(Interrupted, match="stopped with 1 of 2 combinations"):
        sweep(model, tmp_path / "out", pictures)
    kept = (tmp_path / "out/guidance=1.json").read_bytes()
    assert not (tmp_path / "out/guidance=2.json").exists()
    sweep(model, tmp_path / "out", pictures)
    assert judged == [1.0, 2.0, 2.0]
    assert (tmp_path / "out/guidance=1.json").read_bytes() == kept
    capsys.readouterr()
    sweep(model, tmp_path / "out", pictures, over=("guidance=2,1,3",))  # one more value alone is measured
    assert judged[3:] == [3.0]
    order = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  guidance=")]
    assert order == ["guidance=2", "guidance=1", "guidance=3"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num": 14}, "seeds"),
        ({"labels": "reference"}, "labels"),
        ({"settings": ("sampling.steps=2",)}, "settings"),
    ],
)
def test_figures_of_another_sweep_are_not_mixed_in(
    model: Path, pictures: str, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    sweep(model, tmp_path / "out", pictures, over=("guidance=1",))
    before = (tmp_path / "out/guidance=1.json").read_bytes()
    refused(
        lambda: sweep(model, tmp_path / "out", pictures, **changes),
        *("guidance=1.json", f"of other {what}", "choose another --out"),
    )
    assert (tmp_path / "out/guidance=1.json").read_bytes() == before
    assert not (tmp_path / "out/guidance=2.json").exists()


def test_figures_of_other_weights_or_images_are_not_mixed_in(model: Path, pictures: str, tmp_path: Path) -> None:
    sweep(model, tmp_path / "out", pictures, over=("guidance=1",))
    other = pra.load(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    pra.save(other, tmp_path / "other")
    refused(lambda: sweep(tmp_path / "other", tmp_path / "out", pictures), "of other weights")
    shutil.copytree(pictures.removeprefix("folder:"), tmp_path / "fewer")
    (tmp_path / "fewer/a/0.png").unlink()
    refused(lambda: sweep(model, tmp_path / "out", f"folder:{tmp_path / 'fewer'}"), "of other features")


def test_a_file_that_is_no_report(model: Path, pictures: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for text, words in (("{}", "no report of pra eval"), ("{", "guidance=1.json")):
        (tmp_path / "out/guidance=1.json").write_text(text)
        refused(lambda: sweep(model, tmp_path / "out", pictures), words)
        assert (tmp_path / "out/guidance=1.json").read_text() == text


def test_no_figures_of_other_weights_lie_beside_new_ones(model: Path, pictures: str, tmp_path: Path) -> None:
    """Whichever combinations they are of: `pra compare` takes all of a folder."""
    sweep(model, tmp_path / "out", pictures, over=("guidance=1",))
    refused(lambda: sweep(model, tmp_path / "out", pictures, over=("guidance=2",), num=14), "guidance=1.json", "seeds")
    sweep(model, tmp_path / "out", pictures, over=("guidance=1",), settings=("sampling.steps=1",))


def test_a_combination_that_diverges_does_not_end_the_others(
    model: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = command.evaluate

    def diverging(*arguments: Any, **options: Any) -> Report:
        if options["provenance"]["images"]["sampling"]["guidance"] == 2:
            raise NotFiniteError("12 of 12 images are not finite numbers")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(command, "evaluate", diverging)
    with pytest.warns(UserWarning, match="guidance=2 has no figures: 12 of 12 images"):
        sweep(model, tmp_path / "out", pictures, over=("guidance=1,2,3",))
    shown = capsys.readouterr().out
    assert "best by FID: guidance=" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("  guidance=2")]
    assert set(line.split()[1:]) == {"-"}
    assert not (tmp_path / "out/guidance=2.json").exists()
    with pytest.warns(UserWarning, match="guidance=2 has no figures"):
        sweep(model, tmp_path / "none", pictures, over=("guidance=2",))
    assert "no FID is finite" in capsys.readouterr().out


def test_sigterm_says_how_to_go_on(model: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped with 0 of 2 combinations") as stopped:
        sweep(model, tmp_path / "out", pictures)
    assert stopped.value.signum == signal.SIGTERM


def test_the_strip_does_not_depend_on_the_batches(model: Path, pictures: str, tmp_path: Path) -> None:
    for size in (3, 256):
        sweep(model, tmp_path / str(size), pictures, over=("guidance=2",), batch_size=size)
    small, large = (Image.open(tmp_path / name / "guidance=2.png") for name in ("3", "256"))
    assert small.size == large.size


def test_a_damaged_strip_costs_nothing_but_its_row(
    model: Path, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(model, tmp_path / "out", pictures)
    (tmp_path / "out/guidance=1.png").write_text("broken")
    capsys.readouterr()
    sweep(model, tmp_path / "out", pictures)
    shown = capsys.readouterr().out
    assert shown.index("best by FID") < shown.index("samples: ")


def test_curves_run_along_what_varies() -> None:
    pytest.importorskip("matplotlib", reason="draws the curves")
    many = [
        result(1.0 + scale + steps, renormalise=plain, steps=2, guidance=scale, shift=float(steps))
        for plain in (True, False)
        for scale in (1.0, 2.0)
        for steps in range(1, 5)
    ]
    figure = _curves(many)
    assert figure is not None
    assert {axes.get_xlabel() for axes in figure.axes} == {"guidance"}
    assert figure.get_suptitle() == "the 6 best of 8 lines"
    assert len([line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2]) == 6
    assert _curves([result(1.0, steps=2), result(2.0, steps=2)]) is None


def test_what_cannot_be_swept_is_refused_before_any_work(
    model: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_truth", None)
    np.savez(tmp_path / "b.npz", np.zeros((5, 6, 8, 3), np.uint8))
    refused(lambda: sweep(tmp_path / "b.npz", tmp_path / "out", pictures), "no run or model at", "b.npz")
    refused(lambda: sweep(Path(pictures[7:]), tmp_path / "out", pictures), "neither a run nor a model")
    refused(lambda: sweep(model, tmp_path / "out", pictures, over=("solver=heun,shortcut",)), "second head")
    refused(lambda: sweep(model, tmp_path / "out", pictures, num=1), "--num 1")
    refused(
        lambda: sweep(model, tmp_path / "out", pictures, settings=("sampling.guidance=7",)),
        *("--set sampling.guidance=7", "--over guidance="),
    )
    refused(lambda: sweep(model, tmp_path / "out", pictures, features="inseption"), "did you mean 'inception'")
    assert not (tmp_path / "out").exists()


# --- what is done with it -----------------------------------------------------------------------------------


def test_an_exported_model_is_sampled_as_it_was_told(model: Path, tmp_path: Path) -> None:
    export_command(model, tmp_path / "told", settings=("sampling.guidance=2.5", "sampling.guidance_interval=[0, 0.8]"))
    told = pra.load(tmp_path / "told").sampling
    assert (told.guidance, told.guidance_interval) == (2.5, (0.0, 0.8))
    assert told.steps == pra.load(model).sampling.steps
    assert "guidance 2.5 (constant)" in (tmp_path / "told/README.md").read_text()
    refused(lambda: export(tmp_path / "told", tmp_path / "again", sampling={"guidance": 1.0}), "has a card already")
    for settings, words in (
        (("guidance=2",), "settings of the sampler"),
        (("data.fit=pad",), "settings of the sampler"),
        (("sampling.guidance",), "settings of the sampler"),
        (("sampling.guidanse=2",), "did you mean 'guidance'"),
        (("sampling.solver=shortcut", "sampling.steps=4"), "second head"),
    ):
        refused(lambda given=settings: export_command(model, tmp_path / "none", settings=given), words)
    assert not (tmp_path / "none").exists()
