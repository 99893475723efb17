"""Quality against time: what is tried, the front and its names, what the command writes, and who offers it."""

import json
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.answer import caller
from support.files import contents
from support.judging import run_command
from support.models import LEARNED, random_jit, random_model
from support.refusal import refused

import pra
from pra.bench import pareto
from pra.bench.pareto import PARETO, offered, read_tiers, tiers
from pra.commands.pareto import pareto_command
from pra.config import SamplingConfig, Solver
from pra.demo.exhibit import load_exhibits
from pra.demo.generation import Request, answer
from pra.demo.handlers import Handlers, Turn
from pra.demo.page import build_page
from pra.evaluation.evaluate import Report
from pra.evaluation.judging import Adjustable, Subject
from pra.evaluation.sweep import Point, Result
from pra.sampling import Sampler
from pra.sampling.requests import numbered
from pra.utils.pixels import to_uint8

pytestmark = pytest.mark.usefixtures("classifiers")
OWN = SamplingConfig(guidance=2.0, steps=3)


def subject_of(model, sampling=OWN):
    sampler, requests = Sampler(model, sampling), numbered(8, range(5))
    return Subject("it", 8, (6, 8), 3, Adjustable(), {}, sampler=sampler, requests=requests)


def made(*figures):
    """Rows of (FID, seconds), by a solver of as many steps as their place."""
    settings = [replace(OWN, steps=1 + place) for place in range(len(figures))]
    results = [
        Result(Point({"steps": one.steps}, one), Report({"torch-fidelity": {"fid": fid}}, {}))
        for one, (fid, _) in zip(settings, figures, strict=True)
    ]
    return pareto.rows(results, [[took, 2 * took] for _, took in figures], OWN)


def test_tried_settings_begin_with_the_models_own():
    plain = pareto.tried(subject_of(random_model()))
    assert plain[0].sampling == OWN
    assert plain[0].name == "guidance=2,solver=midpoint,steps=3"
    assert len({point.name for point in plain}) == len(plain)
    assert {point.sampling.guidance for point in plain} == {1.0, 2.0}
    assert Solver.SHORTCUT not in {point.sampling.solver for point in plain}
    assert any(point.sampling.raster_steps for point in plain)
    shortcut = pareto.tried(
        subject_of(random_model(head=replace(LEARNED.head, shortcut=True)), replace(OWN, shift=2.0))
    )
    assert {1, 2, 4} <= {point.sampling.steps for point in shortcut if point.sampling.solver is Solver.SHORTCUT}
    alone = pareto.tried(subject_of(random_model(), replace(OWN, guidance=1.0)))
    assert {point.sampling.guidance for point in alone} == {1.0}
    whole = pareto.tried(subject_of(random_jit(), replace(OWN, steps=8, solver=Solver.HEUN)))
    assert {point.sampling.steps for point in whole} == {2, 4, 8}


def test_tried_settings_are_those_asked_for():
    subject = subject_of(random_model())
    points = pareto.tried(subject, ["solver=euler,midpoint", "steps=3,2"])
    assert [point.name for point in points[1:]] == [
        "solver=euler,steps=3",
        "solver=euler,steps=2",
        "solver=midpoint,steps=2",
    ]
    refused(lambda: pareto.tried(subject, ["solver=shortcut"]), "second head")
    refused(lambda: pareto.tried(subject, ["average=raw"]), "--over average", code="unsupported")


def test_front_leaves_out_what_is_worse_and_slower():
    rows = made((2.0, 3.0), (2.05, 1.5), (2.4, 0.5), (2.5, 0.6), (None, 0.1), (9.0, 0.2))
    assert [row.front for row in rows] == [True, True, True, False, False, True]
    assert [row.ratio for row in rows[:2]] == [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)]
    assert tiers(rows) == {"best": "steps=1", "balanced": "steps=2", "fast": "steps=3"}
    assert tiers(made((None, 1.0))) == {}
    assert set(tiers(made((1.0, 1.0))).values()) == {"steps=1"}
    pytest.importorskip("matplotlib")
    axes = pareto.draw(rows, "it").axes[0]
    assert axes.get_xscale() == "log"
    assert {text.get_text() for text in axes.texts} == {"best, default", "balanced", "fast"}


def test_options_of_a_row_give_its_settings(run, tmp_path, capsys):
    """Check also a model that has its own grid for the same number of steps."""
    model, call = pra.load(run), caller(capsys)
    own = model.sampling = replace(model.sampling, steps=2, times=(0.0, 0.4, 1.0))
    pra.save(model, tmp_path / "own")
    for place, changes in enumerate(({}, {"steps": 4, "raster_steps": (4, 1)}, {"steps": 3, "guidance": 3.0})):
        wanted = replace(own, times=None, **changes)
        (row,) = pareto.rows([Result(pareto.named(wanted), Report({}, {}))], [[1.0]], own)
        words = (
            "sample",
            tmp_path / "own",
            "--labels=0",
            "--seeds=0",
            "--device=cpu",
            "--out",
            tmp_path / f"{place}.npz",
        )
        assert call(*words, *row.options).code == 0
        expected = to_uint8(Sampler(model, wanted).sample([0], [0])).permute(0, 2, 3, 1).numpy()
        assert (np.load(tmp_path / f"{place}.npz")["arr_0"] == expected).all()


# --- the command, and who offers what it found --------------------------------------------------------------


def measure(run, **options):
    given = {"num": 12, "side_by_side": 2, "rounds": 2, "over": ("steps=1,2",), "reference": "digits"}
    run_command(pareto_command, run, **given | options)


@pytest.fixture(scope="module")
def measured(trained, classifiers, tmp_path_factory):
    """A run with what the command writes. To be read only."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("measured") / "run")
    measure(folder)
    return folder


def test_command_writes_rows_tiers_and_a_picture(measured, capsys):
    values = json.loads((measured / "pareto" / PARETO).read_text())
    names = [row["name"] for row in values["rows"]]
    assert names[1:] == ["steps=1", "steps=2"][: len(names) - 1]
    assert values["count"] == 12
    assert values["side_by_side"] == 2
    assert set(values["tiers"]) == {"best", "balanced", "fast"}
    assert all(row["seconds_per_image"] > 0 for row in values["rows"])
    assert values["rows"][0]["ratio"] == [1.0, 1.0, 1.0]
    assert (measured / "pareto" / "pareto.png").exists()
    before = contents(measured / "pareto")
    measure(measured)  # the figures are read, the times are measured again
    after = contents(measured / "pareto")
    assert {name for name in before if before[name] != after[name]} <= {"pareto.json", "pareto.png"}
    shown = capsys.readouterr().out
    assert "settings, the model's own first" in shown
    assert f"pra sample {measured} --steps" in shown


def test_tiers_are_on_the_card_and_go_with_an_export(measured, tmp_path):
    (best, *_), model = read_tiers(measured / "pareto" / PARETO), pra.load(measured)
    assert best.name == "best"
    pra.export(measured, tmp_path / "shared", half=True)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"| best | `{shlex.join(best.options)}` | {best.fid:.4g} |" in card
    assert "![FID against seconds per image](./pareto.png)" in card
    assert "\n\n\n" not in card
    assert offered(tmp_path / "shared", None, "ema") == read_tiers(measured / "pareto" / PARETO)
    again = pra.export(tmp_path / "shared", tmp_path / "again")
    assert (again / PARETO).read_bytes() == (measured / "pareto" / PARETO).read_bytes()
    with pytest.warns(UserWarning, match=r"pareto.json is left out: .* other weights"):
        pra.export(measured, tmp_path / "raw", average="raw")
    assert not (tmp_path / "raw" / PARETO).exists()
    assert "pareto" not in (tmp_path / "raw" / "README.md").read_text()
    assert Sampler(model, best.sampling).config == best.sampling


def test_demo_offers_tiers(measured):
    (exhibit,) = load_exhibits([measured], torch.device("cpu"))
    assert [tier.name for tier in exhibit.tiers] == ["best", "balanced", "fast"]
    fast = exhibit.tiers[-1]
    asked = Request(label=1, seed=5, count=2, guidance=9.0, steps=0, tier="fast")
    *_, (sheet,) = answer([exhibit], asked)
    assert torch.equal(sheet.pictures, Sampler(exhibit.model, fast.sampling).sample([1, 1], [5, 6]))
    assert sheet.note.startswith("fast: ")
    *_, (other,) = answer([exhibit], replace(asked, tier="unknown", guidance=1.0))
    assert (other.note, other.error) == ("", "")
    *_, (_, _, kept) = Handlers([exhibit]).make([], Turn(), 0, None, None, 1, 5, 1, 9.0, 0, "", "fast")
    assert kept[0][1].endswith(", fast")
    pytest.importorskip("gradio")
    radios = [part for part in build_page([exhibit]).blocks.values() if type(part).__name__ == "Radio"]
    assert [name for _, name in radios[0].choices] == ["", "fast", "balanced", "best"]


def test_bad_input_is_refused(measured, tmp_path, monkeypatch):
    refused(lambda: measure(measured, rounds=0), option="--rounds", value=0)
    refused(lambda: measure(measured, side_by_side=0), option="--side-by-side", value=0)
    refused(lambda: measure(measured, over=("steps=0",)), "steps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(lambda: measure(measured), "torchrun", code="unsupported")
    path, values = tmp_path / PARETO, json.loads((measured / "pareto" / PARETO).read_text())
    assert read_tiers(path) == []
    for damage in (
        {"rows": 3},
        {"tiers": {"best": "nothing"}},
        {"tiers": {"best": ["x"]}},
        {"rows": [values["rows"][0] | {"sampling": {"stepz": 1}}], "tiers": {"best": values["rows"][0]["name"]}},
        {"rows": [values["rows"][0] | {"fid": None}], "tiers": {"best": values["rows"][0]["name"]}},
    ):
        path.write_text(json.dumps(values | damage))
        refused(lambda: read_tiers(path), code="unreadable", path=path)
