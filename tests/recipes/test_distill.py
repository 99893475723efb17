"""Distillation: the second head's initial weights, its training, and refusals."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.files import contents
from support.models import LEARNED, random_model
from support.refusal import refused
from support.training import train

import pra
from pra import PraError, Sampler, cli
from pra.config import SamplingConfig, Solver, apply_settings, override
from pra.models import build_model, weights
from pra.recipes import distill
from pra.training import callbacks
from pra.training.initial import load_initial
from pra.training.run import read_run

SHORT = replace(LEARNED, head=replace(LEARNED.head, shortcut=True))
GUIDED = replace(SHORT, head=replace(SHORT.head, shortcut_guidance=3.0))


@pytest.mark.parametrize("config", [SHORT, GUIDED])
def test_second_head_begins_as_the_first(config, tmp_path):
    """Shortcut steps equal Euler steps before training."""
    base = random_model()
    pra.save(base, tmp_path / "base")
    model = build_model(config, seed=7)
    model.classes = base.classes
    load_initial(str(tmp_path / "base"), model)
    short, euler = (
        Sampler(model, SamplingConfig(solver=solver, steps=4)).sample([1, 2], [3, 4])
        for solver in (Solver.SHORTCUT, Solver.EULER)
    )
    torch.testing.assert_close(short, euler, atol=1e-5, rtol=1e-5)
    own, first = model.state_dict(), base.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in first.items())


WORDS = ["--device", "cpu", "--set", "train.sample_every=0"]


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Return a trained run and the run distilled from it."""
    base = Path(shutil.copytree(trained, tmp_path_factory.mktemp("distill") / "base"))
    folder = distill.run_folder(str(base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "draw_curves", lambda run: None)
        train(apply_settings(distill.configure(str(base), 3), ["train.sample_every=0"]), folder)
    return base, folder


def test_second_head_alone_learns(runs):
    base, model = map(pra.load, runs)
    assert model.sampling.solver is Solver.SHORTCUT
    first, after = base.state_dict(), model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in first.items())
    heads = {name.removeprefix("shortcut."): after[name] for name in after if name.startswith("shortcut.")}
    assert any(not torch.equal(tensor, first[f"head.{name}"]) for name, tensor in heads.items() if "span" not in name)
    assert heads["span_in.2.weight"].any()
    assert Sampler(model).sample([1], [2]).isfinite().all()
    same = SamplingConfig(guidance=1.5)
    assert torch.equal(Sampler(model, same).sample([1], [2]), Sampler(base, same).sample([1], [2]))


def test_guided_second_head_learns_by_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    base, folder = runs[0], tmp_path / "guided"
    words = ["distill", str(base), "--guidance", "1.2", "--steps", "2", "--run-dir", str(folder), *WORDS]
    assert cli.main(words) == 0
    model, first = pra.load(folder), pra.load(base).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in first.items())
    assert model.state_dict()["shortcut.scale_in.2.weight"].any()
    assert (model.sampling.solver, model.sampling.guidance) == (Solver.SHORTCUT, 1.2)  # the base run has guidance 1.5
    assert Sampler(model).sample([1], [2]).isfinite().all()
    assert cli.main(["distill", str(base), "--guidance", "1", *WORDS]) == 2
    assert "above 1" in capsys.readouterr().err
    assert cli.main(["sample", str(folder), "--guidance", "2", "--out", str(tmp_path / "a.png")]) == 2
    assert "scales 1 to 1.2" in capsys.readouterr().err


def test_distill_refuses_and_resumes(runs, tmp_path, capsys, monkeypatch):
    base, distilled = runs
    pra.save(random_model(), tmp_path / "model")
    before = contents(distilled)
    refused(lambda: distill.configure(str(distilled)), "--solver shortcut", code="exists", path=distilled)
    refused(lambda: distill.configure(str(tmp_path / "model")), code="mismatch", path=tmp_path / "model")
    refused(lambda: distill.configure(str(tmp_path / "nothing")), "no run or model at")
    beside = base.with_name("base-distilled")
    for named in (base, weights.checkpoints(base)[-1]):  # a folder beside the run, not inside it
        assert distill.run_folder(str(named)) == distill.run_folder(f"{named}/") == beside
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    monkeypatch.chdir(base)
    assert distill.run_folder(".") == beside
    assert cli.main(["distill", str(base), "--steps", "3", "--set", "train.seed=8", *WORDS]) == 2
    assert "train.seed" in capsys.readouterr().err
    assert contents(distilled) == before
    assert cli.main(["distill", str(base), "--steps", "4", *WORDS]) == 0
    assert f"next: pra sample {distilled}" in capsys.readouterr().out
    assert weights.checkpoints(distilled)[-1].name.endswith("4")
    assert read_run(distilled).initial == str(base)


def test_trainable_shortcut_without_a_second_head_is_refused():
    tiny = pra.recipe("tiny")
    for config in (tiny, pra.recipe("tiny:jit"), override(tiny, "model.head.shortcut", "true")):
        with pytest.raises(PraError, match="pra distill RUN"):
            override(config, "train.trainable", "shortcut")
