"""Export, push, and the model that is shipped."""

import sys

import pytest
import torch
from PIL import Image
from support.files import contents
from support.hub import TOKEN
from support.models import random_model
from support.refusal import refused

import pra
from pra import cli
from pra.commands.share import export_command
from pra.models import weights
from pra.utils.extras import install_command

NOISE = {"labels": [1, 0], "seeds": [5, 6]}


def same_images(one, other):
    first, second = (pra.Sampler(model).sample(**NOISE) for model in (one, other))
    return torch.equal(first, second)


def test_export_is_a_model_folder_with_card_and_pictures(trained, shared, tmp_path):
    folder = pra.export(trained, tmp_path / "model")
    assert sorted(contents(folder)) == ["README.md", "config.json", "curves.png", "model.safetensors", "samples.png"]
    assert same_images(pra.load(folder), pra.load(trained))
    assert not same_images(pra.load(folder), pra.load(trained, average="raw"))
    newest = sorted((trained / "samples").iterdir())[-1]
    assert (folder / "samples.png").read_bytes() == newest.read_bytes()
    exact, half = (place / "model.safetensors" for place in (weights.model_folder(trained), shared))
    assert half.stat().st_size < 0.6 * exact.stat().st_size
    whole = pra.load(trained).state_dict()
    for name, tensor in pra.load(shared).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name].half().float())
    assert "stored as float16" in (shared / "README.md").read_text()


def test_export_refuses_bad_input(trained, shared, tmp_path):
    there, new, card = tmp_path / "there", tmp_path / "new", shared / "README.md"
    model = random_model()
    with torch.no_grad():
        model.head.out.weight[0, 0] = 1e5
    pra.save(model, there)
    refused(lambda: pra.export(there, new, half=True), "head.out.weight", "--half")
    refused(lambda: pra.export(trained, there), str(there), "exists already")
    refused(lambda: pra.export(tmp_path / "no", new), str(tmp_path / "no"))
    refused(lambda: pra.export(trained, new, licence="do what you like"), licence="do what you like")
    refused(lambda: pra.export(trained, new, repo="alice"), "'alice'", "user/model")
    refused(lambda: pra.export(shared, new, licence="mit"), "--licence", code="conflict", path=card)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_exported_model_is_sampled_as_it_was_told(tmp_path):
    model = pra.save(random_model(), tmp_path / "model")
    export_command(model, tmp_path / "told", settings=("sampling.guidance=2.5", "sampling.guidance_interval=[0, 0.8]"))
    told = pra.load(tmp_path / "told").sampling
    assert (told.guidance, told.guidance_interval) == (2.5, (0.0, 0.8))
    assert told.steps == pra.load(model).sampling.steps
    assert "guidance 2.5 (constant)" in (tmp_path / "told/README.md").read_text()
    refused(lambda: pra.export(tmp_path / "told", tmp_path / "none", sampling={"guidance": 1.0}), code="conflict")
    for settings, words in (
        (("guidance=2",), "settings of the sampler"),
        (("data.fit=pad",), "settings of the sampler"),
        (("sampling.guidance",), "settings of the sampler"),
        (("sampling.guidanse=2",), "did you mean 'guidance'"),
        (("sampling.solver=shortcut", "sampling.steps=4"), "second head"),
    ):
        refused(lambda given=settings: export_command(model, tmp_path / "none", settings=given), words)
    assert not (tmp_path / "none").exists()


# --- the Hub ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("logged_in")
def test_pushed_model_comes_back_and_the_cache_is_enough(hub, trained, tmp_path, monkeypatch, capsys):
    assert cli.main(["push", str(trained), "alice/tiny", "--licence", "mit"]) == 0
    repository = hub.repositories["alice/tiny"]
    assert len(repository.commits) == 2  # the Hub's own, and ours
    number, files = list(repository.commits.items())[-1]
    told = capsys.readouterr().out
    assert f"/alice/tiny/commit/{number}" in told
    assert "next: pra sample hub:alice/tiny" in told
    written = contents(pra.export(trained, tmp_path / "same", licence="mit", repo="alice/tiny"))
    assert files == written | {".gitattributes": b""}
    assert same_images(pra.load("hub:alice/tiny"), pra.load(trained))
    assert len([line for line in hub.requests if line.startswith("GET") and line.endswith("model.safetensors")]) == 1
    assert not any("curves.png" in line for line in hub.requests)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for run, name in (("hub:alice/tiny", "a.png"), (str(trained), "b.png")):
        assert cli.main(["sample", run, "--labels", "3", "--seeds", "0-1", "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not hub.requests


def test_push_refuses_without_the_right_to_write(hub, shared, monkeypatch):
    refused(lambda: pra.push(shared, "alice/tiny"), "no token to push hub:alice/tiny with", "hf auth login")
    refused(lambda: pra.push(shared, "tiny"), "'tiny'", "user/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(lambda: pra.push(shared, "alice/tiny"), "hub:alice/tiny", "401")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(lambda: pra.push(shared, "bob/tiny"), "hub:bob/tiny", "403")
    refused(lambda: pra.push(shared / "none", "alice/tiny"), str(shared / "none"))
    assert not hub.repositories
    pra.push(shared, "alice/mine", private=True)
    assert hub.repositories["alice/mine"].private
    pra.push(shared, "alice/ours")
    before = dict(hub.repositories["alice/ours"].commits)
    refused(lambda: pra.push(shared, "alice/ours", private=True), "--private", code="conflict", repo="hub:alice/ours")
    assert hub.repositories["alice/ours"].commits == before


def test_dry_run_writes_what_push_uploads(trained, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    out = tmp_path / "model"
    assert cli.main(["push", str(trained), "alice/model", "--dry-run", str(out), "--half"]) == 0
    assert "nothing was uploaded to alice/model" in capsys.readouterr().out
    written = contents(out)
    assert b"hub:alice/model" in written.pop("README.md")
    assert written == {name: content for name, content in contents(shared).items() if name != "README.md"}
    refused(lambda: pra.push(trained, "alice/tiny"), install_command("hub"), code="not-installed")


# --- the shipped model --------------------------------------------------------------------------------------


def test_shipped_model_needs_no_name(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", shared)
    assert same_images(pra.load(), pra.load(shared))
    pictures, out = tmp_path / "pictures", tmp_path / "continued.png"
    assert cli.main(["sample", "--labels", "4", "--seeds", "1-2", "--out", str(pictures)]) == 0
    assert len(list(pictures.iterdir())) == 2
    picture = next(pictures.iterdir())
    assert cli.main(["complete", str(picture), "--rows", "2", "--seeds", "1", "--out", str(out)]) == 0
    with Image.open(out) as continued:
        assert continued.size == (8, 8)


def test_shipped_card_loads_without_a_name(trained, tmp_path, monkeypatch):
    shipped = contents(weights.SHIPPED)
    assert {"README.md", "config.json", "model.safetensors"} <= set(shipped)
    assert len(shipped["model.safetensors"]) <= 8e6
    assert pra.Sampler(pra.load()).sample([0], [0]).isfinite().all()
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "shipped")
    refused(pra.load, "hub:user/model", "pra train digits")  # a build without a model
    card = (pra.export(trained, tmp_path / "shipped", half=True) / "README.md").read_text()
    for line in ("# tiny", "model = pra.load()", "$ pra sample --labels all --seeds 0-7"):
        assert f"\n{line}\n" in card
