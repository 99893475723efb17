"""`pra sweep`: the settings it tries, the same figures as `pra eval`, resuming, refusals."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import processes
from support.files import contents
from support.judging import noise_pictures, run_command, saved_model
from support.refusal import refused

import pra
from pra.commands.eval import evaluate_command
from pra.commands.sweep import sweep_command
from pra.config import GuidanceSchedule, SamplingConfig, Solver
from pra.errors import NotFiniteError
from pra.evaluation import classifier, judging
from pra.evaluation.evaluate import Report
from pra.evaluation.sweep import COLUMNS, Point, Result, curves, find_best, hints, points, table
from pra.utils.pixels import contact_sheet
from pra.utils.provenance import file_sha256
from pra.utils.signals import Interrupted

LEARNT = SamplingConfig(steps=2, times=(0.0, 0.5, 1.0))
pytestmark = pytest.mark.usefixtures("classifiers")


@pytest.mark.parametrize(
    ("over", "names", "changed"),
    [
        (
            ["guidance=1,1.5", "solver=heun, dpm"],
            [f"guidance={scale},solver={solver}" for scale in ("1", "1.5") for solver in ("heun", "dpm")],
            {"guidance": 1.5, "solver": Solver.DPM},
        ),
        (
            ["sampling.guidance_interval=[0,0.8],[0.1,1]", "renormalise=false"],
            ["guidance_interval=0,0.8,renormalise=false", "guidance_interval=0.1,1,renormalise=false"],
            {"guidance_interval": (0.1, 1.0), "renormalise": False},
        ),
        (["schedule=linear"], ["schedule=linear"], {"schedule": GuidanceSchedule.LINEAR}),
        (["guidance=1,1.0,1e0,2"], ["guidance=1", "guidance=2"], {"guidance": 2.0}),
        # Other steps than a learnt grid has.
        (["steps=2,3"], ["steps=2", "steps=3"], {"steps": 3, "times": None}),
    ],
)
def test_points_are_all_combinations(over, names, changed):
    tried = points(LEARNT, over)
    assert [point.name for point in tried] == names
    assert tried[-1].sampling == replace(LEARNT, **changed)


def test_points_are_written_as_options():
    _, tried = points(SamplingConfig(), ["guidance=1,1.00000001", "solver=heun"])
    assert tried.options == ["--guidance", "1.00000001", "--solver", "heun"]
    assert tried.settings == ["--set", "sampling.guidance=1.00000001", "--set", "sampling.solver=heun"]
    none, own = points(LEARNT, ["times=null,[0,0.4,1]"])
    assert (none.name, none.options, none.settings) == ("times=null", [], ["--set", "sampling.times=null"])
    assert own.options == ["--times", "0,0.4,1"]
    assert own.settings[1] == "sampling.times=[0.0, 0.4, 1.0]"


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["guidance"], ("--over 'guidance'", "KEY=VALUE")),
        (["guidance=1,,2"], ("--over 'guidance=1,,2'",)),
        (["guidance="], ("--over 'guidance='",)),
        (["guidance=1", "sampling.guidance=2"], ("names guidance twice",)),
        (["guidanse=1"], ("guidanse", "did you mean 'guidance'")),
        (["guidance=much"], ("guidance", "much")),
        (["steps=0,3"], ("steps", "0")),
        (["guidance_interval=0,0.8"], ("--over guidance_interval=0", "brackets")),
        (["steps=" + "9" * 5000], ("--over steps=",)),
        ([f"times=[{','.join(f'{n / 64:g}' for n in range(65))}]"], ("times=0,0.015625", "at most 200", "--set")),
    ],
)
def test_points_that_cannot_be_are_refused(over, words):
    refused(lambda: points(SamplingConfig(), over), *words)


# --- results ------------------------------------------------------------------------------------------------


def result(fid, **changes):
    return Result(Point(changes, SamplingConfig(**changes)), Report({"torch-fidelity": {"fid": fid, "kid": 0.1}}, {}))


def test_the_best_is_the_lowest_finite_fid():
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


def test_a_best_at_the_edge_is_told():
    rising = [result(fid, guidance=scale) for scale, fid in ((1.0, 3.0), (2.0, 2.0), (3.0, 1.0))]
    told = "the best guidance, 3, is the largest that was tried: a better value may lie beyond it"
    assert list(hints(rising, rising[-1])) == [told]
    assert list(hints(rising, rising[1])) == []
    assert list(hints(rising, rising[0])) == []  # 1 is off
    assert list(hints(rising[:1], rising[0])) == []  # it was not varied
    colder = [result(fid, temperature=scale) for scale, fid in ((0.9, 1.0), (1.0, 2.0))]
    assert "smallest" in next(hints(colder, colder[0]))
    weaker = [result(fid, guidance=scale) for scale, fid in ((0.5, 2.0), (1.0, 1.0))]
    assert "largest" in next(hints(weaker, weaker[1]))
    steps = [result(fid, steps=count) for count, fid in ((2, 2.0), (5, 1.0))]
    assert list(hints(steps, steps[1])) == []  # always the most


def test_curves_run_along_what_varies():
    pytest.importorskip("matplotlib", reason="draws the curves")
    many = [
        result(1.0 + scale + steps, renormalise=plain, steps=2, guidance=scale, shift=float(steps))
        for plain in (True, False)
        for scale in (1.0, 2.0)
        for steps in range(1, 5)
    ]
    figure = curves(many)
    assert figure is not None
    assert {axes.get_xlabel() for axes in figure.axes} == {"guidance scale"}
    assert figure.get_suptitle() == "the 6 best of 8 lines"
    assert len([line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2]) == 6
    assert curves([result(1.0, steps=2), result(2.0, steps=2)]) is None


# --- the command --------------------------------------------------------------------------------------------


OVER = ("guidance=1,2",)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return noise_pictures(tmp_path_factory.mktemp("pictures"), {"a": 12, "b": 12})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model") / "model", ["a", "b"])


@pytest.fixture(scope="module")
def swept(model, pictures, classifiers, tmp_path_factory):
    """The folder of a sweep over ``OVER``, whose batches are shorter than a strip. To be read only."""
    folder = tmp_path_factory.mktemp("swept") / "out"
    sweep(model, folder, pictures, batch_size=3)
    return folder


@pytest.fixture
def out(swept, tmp_path):
    """A copy of that folder with the first point alone."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in swept.glob("guidance=1.*"):
        shutil.copy(path, folder)
    return folder


def sweep(target, out, pictures, **options):
    given = {"over": OVER, "num": 12, "settings": ("sampling.steps=1",)}
    run_command(sweep_command, target, reference=pictures, out=out, **given | options)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def before_each(monkeypatch):
    """``before_each(hook)``: a function of the guidance that runs before a point is judged."""
    evaluate = judging.evaluate

    def install(hook):
        def hooked(*arguments, **options):
            hook(options["provenance"]["images"]["sampling"]["guidance"])
            return evaluate(*arguments, **options)

        monkeypatch.setattr(judging, "evaluate", hooked)

    return install


def test_every_point_is_what_eval_measures(model, pictures, swept, tmp_path, capsys):
    sweep(model, swept, pictures)  # once more: all is there
    shown = capsys.readouterr().out
    names = ("guidance=1.json", "guidance=1.png", "guidance=2.json", "guidance=2.png", "samples.jpg", "sweep.png")
    assert tuple(sorted(path.name for path in swept.iterdir())) == names
    run_command(
        evaluate_command, model, reference=pictures, num=12, batch_size=3, out=tmp_path / "eval.json",
        settings=("sampling.steps=1", "sampling.guidance=2"),
    )  # fmt: skip
    ours, theirs = read(swept / "guidance=2.json"), read(tmp_path / "eval.json")
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
    # Strips show the first images.
    sampler = pra.Sampler(pra.load(model), steps=1, guidance=2.0)
    expected = contact_sheet(sampler.sample([0, 1] * (COLUMNS // 2), range(COLUMNS)), COLUMNS)
    with Image.open(swept / "guidance=2.png") as strip:
        assert np.array_equal(np.asarray(strip), np.asarray(expected))


@pytest.mark.slow
def test_two_processes_agree_with_one(run, tmp_path, capsys):
    """Sweep a run, with results in its folder."""
    sweep(run, None, "digits", num=20, over=("guidance=1.5",))
    assert f"to share it so: pra export {run} DIR --set sampling.guidance=1.5" in capsys.readouterr().out
    (run / "sweep").rename(tmp_path / "one")
    known = read(tmp_path / "one/guidance=1.5.json")["provenance"]["features"]["sha256"]
    fitted = next(path for path in classifier.cache_folder().iterdir() if file_sha256(path) == known)
    leader, other = processes.run(
        tmp_path / "said", 2, "sweep", run, "--reference", "digits", "--features", "classifier",
        "--weights", fitted, "--num", 20, "--device", "cpu", "--set", "sampling.steps=1", "--over", "guidance=1.5",
    )  # fmt: skip
    assert (leader.code, other.code, other.out, other.error) == (0, 0, "", ""), leader.error
    one, two = (read(home / "guidance=1.5.json") for home in (tmp_path / "one", run / "sweep"))
    protocol = "torch-fidelity"
    assert two["figures"][protocol]["fid"] == pytest.approx(one["figures"][protocol]["fid"], rel=1e-5)
    assert two["provenance"]["images_sha256"] == one["provenance"]["images_sha256"]
    strips = [(home / "guidance=1.5.png").read_bytes() for home in (tmp_path / "one", run / "sweep")]
    assert strips[0] == strips[1]


def test_sweep_over_averages_judges_each(run, tmp_path, capsys):
    """The folder may hold a sweep of the default average, whose figures are of other weights."""
    reference = noise_pictures(tmp_path / "ten", dict.fromkeys("0123456789", 2), (8, 8))
    sweep(run, None, reference, num=20, over=("guidance=1",))
    sweep(run, None, reference, num=20, over=("average=ema,raw", "guidance=1"))
    shown = capsys.readouterr().out
    names = ("guidance=1", "average=ema,guidance=1", "average=raw,guidance=1")
    default, ema, raw = (read(run / "sweep" / f"{name}.json") for name in names)
    assert ema["figures"] == default["figures"] != raw["figures"]
    assert [one["provenance"]["images"]["weights"] for one in (ema, raw)] == ["ema.safetensors", "model.safetensors"]
    run_command(
        evaluate_command, run, reference=reference, num=20, out=tmp_path / "raw.json", average="raw",
        settings=("sampling.steps=1", "sampling.guidance=1"),
    )  # fmt: skip
    assert read(tmp_path / "raw.json")["figures"] == raw["figures"]
    best = "raw" if "best by FID: average=raw" in shown else "ema"
    assert f"next: pra sample {run} --average {best} --guidance 1 --steps 1\n" in shown
    assert f"to share it so: pra export {run} DIR --average {best} --set sampling.guidance=1 " in shown
    refused(lambda: sweep(run, None, reference, over=("average=ema,emma",)), "'emma'", "ema, raw")


def test_stopped_sweep_goes_on(model, pictures, tmp_path, before_each, capsys):
    out, judged = tmp_path / "out", []

    def stopping(guidance):
        judged.append(guidance)
        if len(judged) == 2:
            raise KeyboardInterrupt
        if len(judged) in (3, 4):
            signal.raise_signal(signal.SIGTERM if len(judged) == 3 else signal.SIGHUP)

    before_each(stopping)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(Interrupted, match="stopped with 1 of 2 combinations") as stopped:
            sweep(model, out, pictures)
        assert stopped.value.signum == number
        assert not (out / "guidance=2.json").exists()
    kept = (out / "guidance=1.json").read_bytes()
    (out / "guidance=1.png").write_text("broken")  # costs its row in the picture alone
    sweep(model, out, pictures, over=("guidance=2,1,3",))  # the rest is measured, and one more value
    assert judged == [1.0, 2.0, 2.0, 2.0, 2.0, 3.0]
    assert (out / "guidance=1.json").read_bytes() == kept
    shown = capsys.readouterr().out
    order = [line.split()[0] for line in shown.splitlines() if line.startswith("  guidance=")]
    assert order == ["guidance=2", "guidance=1", "guidance=3"]
    assert shown.index("best by FID") < shown.index("samples: ")


def test_figures_of_another_sweep_are_not_mixed_in(model, pictures, out, tmp_path):
    before, first = contents(out), out / "guidance=1.json"
    for changes, what in (
        ({"num": 14}, "seeds"),
        ({"labels": "reference"}, "labels"),
        ({"settings": ("sampling.steps=2",)}, "settings"),
        ({"num": 14, "over": ("guidance=3",)}, "seeds"),  # `pra compare` takes all of a folder
    ):
        refused(lambda given=changes: sweep(model, out, pictures, **given), code="mismatch", path=first, what=what)
        assert {name: data for name, data in contents(out).items() if name != ".lock"} == before
    other = pra.load(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    pra.save(other, tmp_path / "other")
    refused(lambda: sweep(tmp_path / "other", out, pictures), code="mismatch", what="weights")
    shutil.copytree(pictures.removeprefix("folder:"), tmp_path / "fewer")
    (tmp_path / "fewer/a/00.png").unlink()
    fewer = f"folder:{tmp_path / 'fewer'}"
    refused(lambda: sweep(model, out, fewer), code="mismatch", what="features")
    known = read(first)["provenance"]["features"]["sha256"]
    weights = next(path for path in classifier.cache_folder().iterdir() if file_sha256(path) == known)
    refused(lambda: sweep(model, out, fewer, weights=weights), code="mismatch", what="reference")
    for text in ("{}", "{"):  # not a report
        first.write_text(text)
        refused(lambda: sweep(model, out, pictures), "guidance=1.json")
        assert first.read_text() == text


def test_diverging_combination_does_not_end_the_others(model, pictures, out, before_each, capsys):
    def diverging(guidance):
        if guidance == 2:
            raise NotFiniteError("12 of 12 images are not finite numbers")

    before_each(diverging)
    with pytest.warns(UserWarning, match="guidance=2 has no figures: 12 of 12 images"):
        sweep(model, out, pictures)
    shown = capsys.readouterr().out
    assert "best by FID: guidance=1" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("  guidance=2")]
    assert set(line.split()[1:]) == {"-"}
    assert not (out / "guidance=2.json").exists()
    with pytest.warns(UserWarning, match="guidance=2 has no figures"):
        sweep(model, out, pictures, over=("guidance=2",))
    assert "no FID is finite" in capsys.readouterr().out


def test_bad_input_is_refused_before_any_work(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("pra.commands.sweep.open_truth", None)
    out, batch = tmp_path / "out", tmp_path / "b.npz"
    np.savez(batch, np.zeros((5, 6, 8, 3), np.uint8))
    refused(lambda: sweep(batch, out, pictures), str(batch))
    refused(lambda: sweep(Path(pictures[7:]), out, pictures), pictures[7:])
    refused(lambda: sweep(model, out, pictures, over=("solver=heun,shortcut",)), "second head")
    refused(lambda: sweep(model, out, pictures, num=1), code="invalid", option="--num", value=1)
    refused(lambda: sweep(model, out, pictures, settings=("sampling.guidance=7",)), code="conflict", name="guidance")
    refused(lambda: sweep(model, out, pictures, features="inseption"), "did you mean 'inception'", code="unknown")
    assert not out.exists()
