"""Extension without a fork: terms of the loss, data sources and features from outside the package."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.pages import ROOT, script
from support.refusal import refused
from support.training import TERMS, assert_same, edges, smooth, tensors, tiny, train

import pra
from pra import cli
from pra.data import open_source
from pra.data.images import ArraySource
from pra.data.source import SOURCES, check_name
from pra.evaluation.features import REGISTRY
from pra.training.plots import draw_curves, panels
from pra.training.run import loss_terms, read_metrics
from pra.utils import registry

EXAMPLES = sorted((ROOT / "examples" / "extend").glob("*.py"))


@pytest.fixture(scope="module")
def with_terms(tmp_path_factory):
    """Two steps with the terms."""
    folder = tmp_path_factory.mktemp("terms") / "run"
    train(tiny("train.steps=2"), folder, losses=TERMS)
    return folder


def test_losses_users_terms_are_in_metrics_and_curves(with_terms, tmp_path):
    rows = read_metrics(with_terms)
    assert loss_terms(rows) == ["pixel", "flow", "auxiliary", "edges", "smooth"]
    for row in rows:
        parts = row["pixel"] + row["flow"] + 0.1 * row["auxiliary"] + 0.5 * row["edges"] + 0.01 * row["smooth"]
        assert row["total"] == pytest.approx(parts, rel=1e-5)
    titles = panels(rows, tiny().train.objective)
    assert [*titles.values()][:4] == ["pixel", "flow", "auxiliary (weight 0.1)", "edges"]
    assert draw_curves(Path(shutil.copytree(with_terms, tmp_path / "drawn"))) is not None
    (board,) = (with_terms / "tensorboard").iterdir()
    assert b"edges" in board.read_bytes()


def test_losses_term_changes_weights_and_zero_does_not(straight, with_terms, tmp_path):
    train(tiny(), tmp_path / "zero", losses={"edges": (0.0, edges)})
    assert_same(straight, tmp_path / "zero", 2)
    plain, other = tensors(straight, 2), tensors(with_terms)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    refused(lambda: train(tiny("train.steps=9"), straight, losses=TERMS), code="mismatch", losses={})


def test_losses_users_terms_resume_bitwise(with_terms, tmp_path):
    run = Path(shutil.copytree(with_terms, tmp_path / "run"))
    config, known = tiny("train.steps=4"), {"edges": 0.5, "smooth": 0.01}
    for losses in (None, {"edges": (0.1, edges), "smooth": (0.01, smooth)}):
        refused(lambda losses=losses: train(config, run, losses=losses), code="mismatch", losses=known)
    for folder in (run, tmp_path / "straight"):
        train(config, folder, losses=TERMS)
    assert_same(run, tmp_path / "straight")


def test_losses_term_of_jit_sees_images_only(tmp_path):
    seen = []

    def term(known):
        seen.append(known)
        return next(iter(known.model.parameters())).square().mean()

    train(tiny("train.steps=1", recipe="tiny:jit"), tmp_path / "run", losses={"weights": (0.1, term)})
    assert (seen[0].states, seen[0].decoded, seen[0].conditions) == (None, None, None)
    assert seen[0].patches.shape[0] == seen[0].images.shape[0] == len(seen[0].labels)


def test_losses_bad_terms_are_refused(tmp_path):
    cases = [
        ({"flow": (1.0, edges)}, ("'flow'", "the name is taken")),
        ({"gradient_norm": (1.0, edges)}, ("'gradient_norm'", "the name is taken")),
        ({"validation_flow": (1.0, edges)}, ("the name is taken",)),
        ({"a b": (1.0, edges)}, ("'a b'", "not an identifier")),
        ({"edges": edges}, ("'edges'", "expected (weight, function)")),
        ({"edges": (1.0, 2.0)}, ("expected (weight, function)",)),
        ({"edges": (math.inf, edges)}, ("weight inf", "not a finite number")),
        ({"edges": ("1", edges)}, ("weight '1'",)),
    ]
    for losses, parts in cases:
        refused(lambda losses=losses: train(tiny(), tmp_path / "run", losses=losses), *parts)
    assert not (tmp_path / "run").exists()
    for value in (torch.zeros(2), 0.5):
        own = {"edges": (1.0, lambda known, value=value: value)}
        refused(lambda own=own: train(tiny(), tmp_path / "run", losses=own), "'edges': expected a scalar tensor")


def test_losses_with_compile_change_only_blocks(tmp_path, monkeypatch):
    made = []

    def compiled(function, *_):
        made.append(function.__name__)
        return function

    monkeypatch.setattr("pra.training.step.compiled", compiled)
    train(tiny("train.steps=1", "train.compile=true"), tmp_path / "run", losses=TERMS)
    assert set(made) == {"forward"}


@pytest.fixture(autouse=True)
def no_names_left(monkeypatch):
    """Names that a test registers are forgotten after it."""
    for registered in (REGISTRY, SOURCES):
        monkeypatch.setattr(registered, "registered", {})


def grey(name, argument):
    count = int(argument or 4)
    return ArraySource(name, np.full((count, 8, 8), 128, np.uint8), np.zeros(count, np.int64), ("grey",))


def test_sources_registered_name_opens_with_argument():
    pra.register_source("plain", grey)
    assert [len(open_source(name)) for name in ("plain", "plain:7")] == [4, 7]
    assert open_source("plain:7").name == "plain:7"
    refused(lambda: check_name("plane:3"), "'plane:3' is unknown", "did you mean 'plain'", "folder", "digits")


def test_sources_bad_registrations_are_refused():
    for name in ("folder", "digits", "emoji", "hf"):
        refused(lambda name=name: pra.register_source(name, grey), f"data source '{name}' is built in")
    refused(lambda: pra.register_source("a:b", grey), "'a:b'", "malformed")
    refused(lambda: pra.register_source("mine", 3), "3 is not callable")  # type: ignore[arg-type]
    pra.register_source("wrong", lambda name, argument: 3)  # type: ignore[arg-type,return-value]
    refused(lambda: open_source("wrong:1"), "'wrong:1'", "3 is not a source")


@pytest.fixture
def entry_points(monkeypatch):
    """Entry points of all groups, by name."""
    points = {}
    monkeypatch.setattr(registry, "_entry_points", lambda group: points)
    return points


def test_sources_entry_point_is_a_source(entry_points):
    def load():
        raise ImportError("no module named x")

    entry_points["packaged"] = SimpleNamespace(value="package:grey", load=lambda: grey)
    refused(lambda: check_name("packagd"), "did you mean 'packaged'")
    assert len(open_source("packaged:5")) == 5
    entry_points["broken"] = SimpleNamespace(value="package:nothing", load=load)
    refused(lambda: open_source("broken:1"), "'broken'", "'package:nothing' cannot be loaded", "no module named x")


def test_features_entry_point_is_a_choice(entry_points, trained, capsys):
    features = script(ROOT / "examples" / "extend" / "thumbnail_features.py").Thumbnails
    entry_points["packaged-features"] = SimpleNamespace(value="package:Thumbnails", load=lambda: features)
    refused(lambda: pra.register_features("inception", REGISTRY.added), "'inception' is built in")  # type: ignore[arg-type]
    pra.register_features("nothing", lambda weights, device: 3)  # type: ignore[arg-type,return-value]
    line = ["eval", str(trained), "--num", "16", "--reference", "digits@test", "--device", "cpu", "--features"]
    assert cli.main([*line, "packaged-features"]) == 0
    assert "features thumbnails" in capsys.readouterr().out
    assert cli.main([*line, "packagd-features"]) == 2
    assert "did you mean 'packaged-features'" in capsys.readouterr().err
    assert cli.main([*line, "nothing"]) == 2
    assert "features 'nothing': 3 is not an extractor" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["edge_loss", "stripes_source", "weight_norm"])
def test_examples_train_a_run(tmp_path, name, capsys):
    script(ROOT / "examples" / "extend" / f"{name}.py").main(str(tmp_path / "run"))
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 20
    said = capsys.readouterr().out
    assert {"edge_loss": "edges", "weight_norm": "weight_norm"}.get(name, "flow") in rows[0]
    assert ("step 20: " in said) == (name == "weight_norm")


def test_examples_features_judge_a_run(trained, capsys):
    example = script(ROOT / "examples" / "extend" / "thumbnail_features.py")
    with pytest.raises(SystemExit) as ended:
        example.main(str(trained))
    assert ended.value.code == 0
    assert "features thumbnails" in capsys.readouterr().out


def test_examples_are_short_and_all_quoted_by_the_page():
    page = (ROOT / "docs" / "extend.md").read_text()
    assert len(EXAMPLES) == 4
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 40
        assert f"<!-- file: examples/extend/{path.name} -->" in page
