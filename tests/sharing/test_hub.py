"""Sharing: what is written of a run, its card, the way to the Hub (a stand-in) and back, the shipped model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.files import contents
from support.hub import TOKEN, Hub, Repository, serving
from support.models import LEARNED, random_jit, random_model
from support.refusal import refused

import pra
from pra import cli
from pra.models import weights
from pra.utils.extras import install_command
from pra.utils.provenance import file_sha256

NOISE = {"labels": [1, 0], "seeds": [5, 6]}


def report(run: Path, fid: float, sha256: str = "") -> dict[str, object]:
    """What `pra eval` writes, on the weights of a run unless other ones are named."""
    newest = weights.model_folder(run)
    return {
        "figures": {"adm": {"fid": fid, "sfid": None}},
        "provenance": {
            "features": {"name": "classifier", "sha256": "ab" * 32, "held_out_accuracy": 0.9},
            "reference": {"name": "digits", "count": 1498},
            "images": {
                "weights_sha256": sha256 or file_sha256(newest / weights.weights_name(newest)),
                "sampling": {
                    "guidance": 1.5, "schedule": "constant", "solver": "midpoint", "steps": 2, "temperature": 1.0,
                },
                "labels": "index % 10", "seeds": "0-39", "count": 40,
            },
            "environment": {"versions": {"pra": "0.1.0", "torch": "2.0"}, "hardware": {"device": "abacus"}},
        },
    }  # fmt: skip


def same_images(one: pra.PRA, other: pra.PRA) -> bool:
    first, second = (pra.Sampler(model).sample(**NOISE) for model in (one, other))
    return torch.equal(first, second)


# --- the folder that is shared ------------------------------------------------------------------------------


def test_an_export_is_a_model_folder_with_card_pictures_and_the_moving_average(trained: Path, tmp_path: Path) -> None:
    folder = pra.export(trained, tmp_path / "model")
    assert sorted(contents(folder)) == ["README.md", "config.json", "curves.png", "model.safetensors", "samples.png"]
    assert same_images(pra.load(folder), pra.load(trained))
    assert not same_images(pra.load(folder), pra.load(trained, average="raw"))
    newest = sorted((trained / "samples").iterdir())[-1]
    assert (folder / "samples.png").read_bytes() == newest.read_bytes()


def test_of_an_older_checkpoint_the_card_tells_its_own_steps(trained: Path, tmp_path: Path) -> None:
    folder = pra.export(trained / "checkpoints" / "step-00000010", tmp_path / "model")
    assert "- 10 steps of 8 images" in (folder / "README.md").read_text()


def test_half_precision_is_half_the_size_and_float32_again_when_loaded(trained: Path, tmp_path: Path) -> None:
    whole, half = pra.export(trained, tmp_path / "whole"), pra.export(trained, tmp_path / "half", half=True)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    rounded, exact = pra.load(half).state_dict(), pra.load(whole).state_dict()
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name].half().float())
    assert "stored as float16" in (half / "README.md").read_text()


def test_bfloat16_weights_are_taken_and_integers_are_not(tmp_path: Path) -> None:
    model = random_model()
    folder = pra.save(model, tmp_path / "model")
    path = folder / "model.safetensors"
    weights.write_tensors({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path)
    assert torch.equal(pra.load(folder).head.state_dict()["out.weight"], model.head.out.weight.bfloat16().float())
    weights.write_tensors({name: tensor.int() for name, tensor in model.state_dict().items()}, path)
    refused(lambda: pra.load(folder), str(path), "is stored as int32")


def test_a_weight_beyond_float16_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.head.out.weight[0, 0] = 1e5
    pra.save(model, tmp_path / "model")
    refused(lambda: pra.export(tmp_path / "model", tmp_path / "half", half=True), "head.out.weight", "leave --half out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_edited_card_is_kept(trained: Path, tmp_path: Path) -> None:
    first = pra.export(trained, tmp_path / "first", half=True)
    (first / "README.md").write_text("Mine.")
    second = pra.export(first, tmp_path / "second")
    assert contents(first) == contents(second)
    refused(lambda: pra.export(first, tmp_path / "third", licence="mit"), str(first / "README.md"), "--licence")


def test_a_card_keeps_the_figures_that_it_speaks_of(run: Path, tmp_path: Path) -> None:
    (run / "figures.json").write_text(json.dumps(report(run, 12.345)))
    first = pra.export(run, tmp_path / "first", half=True)  # whose hash is not that of the weights measured
    with (first / "README.md").open("a") as card:
        card.write("\nMine.\n")
    second = pra.export(first, tmp_path / "second")
    assert contents(first) == contents(second)
    assert "figures.json" in contents(second)
    (first / "other.json").write_text(json.dumps(report(run, 77.7)))
    with pytest.warns(UserWarning, match=r"other\.json is left out: its figures are of other weights"):
        assert "other.json" not in contents(pra.export(first, tmp_path / "third"))


def test_notes_in_a_run_s_folder_are_no_card(run: Path, tmp_path: Path) -> None:
    (run / "README.md").write_text("Mine alone.")
    card = (pra.export(run, tmp_path / "model", licence="mit") / "README.md").read_text()
    assert "Mine alone." not in card
    assert "recipe `tiny`" in card


def test_what_export_refuses(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refused(lambda: pra.export(trained, tmp_path / "there"), str(tmp_path / "there"), "exists already")
    refused(lambda: pra.export(tmp_path / "no", tmp_path / "new"), "no run or model at", str(tmp_path / "no"))
    refused(lambda: pra.export(trained, tmp_path / "new", licence="do what you like"), "'do what you like'")
    refused(lambda: pra.export(trained, tmp_path / "new", repo="alice"), "'alice'", "user/model")
    assert not (tmp_path / "new").exists()


# --- the card -----------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_knows(run: Path, tmp_path: Path) -> None:
    (run / "figures.json").write_text(json.dumps(report(run, 12.345)))
    card = (pra.export(run, tmp_path / "m", licence="apache-2.0", repo="alice/tiny") / "README.md").read_text()
    matter = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    assert {name: json.loads(value) for name, value in matter.items() if name != "tags"} == {
        "license": "apache-2.0", "library_name": "pra", "pipeline_tag": "unconditional-image-generation",
    }  # fmt: skip
    assert "class-conditional-image-generation" in json.loads(matter["tags"])
    commit = json.loads((run / "environment.json").read_text())["commit"]
    for told in (
        'pra.load("hub:alice/tiny")', "pra sample hub:alice/tiny", "guidance 1.5 (constant), 2 midpoint steps",
        "recipe `tiny`", "data: `digits`", "20 steps of 8 images", "12.345", "accuracy 0.9 on held-out images",
        "40 images: labels index % 10, seeds 0-39", "on abacus", "[figures.json](./figures.json)", "`apache-2.0`",
        f"commit `{commit}`", "![Samples](./samples.png)", "![Training curves](./curves.png)",
    ):  # fmt: skip
        assert told in card
    for picture in re.findall(r"\]\(\./(.*?)\)", card):
        assert (tmp_path / "m" / picture).exists()


def test_the_front_matter_is_yaml(trained: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="comes with the extra hub")
    card = (pra.export(trained, tmp_path / "model", licence="cc-by-4.0") / "README.md").read_text()
    values = yaml.safe_load(card.split("---")[1])
    assert values["license"] == "cc-by-4.0"
    assert values["tags"][:2] == ["image-generation", "pixel-space"]


def test_figures_of_other_weights_are_left_out(run: Path, tmp_path: Path) -> None:
    (run / "old.json").write_text(json.dumps(report(run, 77.7, sha256="0" * 64)))
    (run / "notes.json").write_text('{"figures": 3}')
    with pytest.warns(UserWarning, match=r"old\.json is left out: its figures are of other weights"):
        folder = pra.export(run, tmp_path / "model")
    assert not {"old.json", "notes.json"} & set(contents(folder))
    card = (folder / "README.md").read_text()
    assert "77.7" not in card
    assert "None: nobody has run `pra eval` on these weights." in card


def test_a_model_of_unknown_origin_gets_a_card_without_inventions(tmp_path: Path) -> None:
    model = random_model(num_classes=1)
    model.classes = ("cat",)
    pra.save(model, tmp_path / "model")
    card = (pra.export(tmp_path / "model", tmp_path / "out") / "README.md").read_text()
    assert "license" not in card.split("---")[1]
    assert "class-conditional" not in card
    assert "## Training" not in card
    assert "The author of these weights states none." in card
    assert "- classes: cat" in card


def test_the_card_of_many_classes_draws_some_of_them(tmp_path: Path) -> None:
    model = random_model(num_classes=1000)
    model.classes = tuple(map(str, range(1000)))
    pra.save(model, tmp_path / "model")
    card = (pra.export(tmp_path / "model", tmp_path / "out") / "README.md").read_text()
    assert "--labels 0-9 --seeds 0-7" in card


def test_the_card_of_a_jit_speaks_of_whole_images(tmp_path: Path) -> None:
    pra.save(random_jit(), tmp_path / "model")
    card = (pra.export(tmp_path / "model", tmp_path / "out") / "README.md").read_text()
    assert "steps per image" in card
    assert "cannot complete an image" in card


def test_the_card_names_a_folder_of_pictures_and_not_the_folders_above(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = "folder:/home/alice/secret/cats"
    (run / "config.json").write_text(json.dumps(config))
    card = (pra.export(run, tmp_path / "model") / "README.md").read_text()
    assert "data: `folder:cats`" in card
    assert "secret" not in card


# --- the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of our own, an empty cache, and nobody logged in."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs pip install 'pra-pixels[hub]'")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        template = "{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{state.url}/{template}")
        yield state


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def publish(hub: Hub, folder: Path, name: str = "bob/model", **changes: bool) -> str:
    """Lays a folder on the Hub; the commit."""
    repository = hub.repositories.setdefault(name, Repository(**changes))
    return repository.commit(contents(folder))


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("logged_in")
def test_push_and_load_bring_the_same_model_back_and_the_cache_is_enough(
    hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = pra.push(trained, "alice/tiny", licence="mit")
    repository = hub.repositories["alice/tiny"]
    assert len(repository.commits) == 2  # the Hub's own, and ours
    number, files = list(repository.commits.items())[-1]
    assert address.endswith(f"/alice/tiny/commit/{number}")
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "curves.png", "model.safetensors", "samples.png",
    }  # fmt: skip
    assert b'pra.load("hub:alice/tiny")' in files["README.md"]
    assert same_images(pra.load("hub:alice/tiny"), pra.load(trained))
    downloads = [line for line in hub.requests if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(downloads) == 1
    assert not any("curves.png" in line for line in hub.requests)
    hub.requests.clear()
    offline(monkeypatch)
    assert same_images(pra.load("hub:alice/tiny"), pra.load(trained))
    assert not hub.requests


def test_a_revision_is_another_commit(hub: Hub, tmp_path: Path) -> None:
    models = [random_model(), random_model(LEARNED, class_tokens=1)]
    first, second = (publish(hub, pra.save(model, tmp_path / str(i))) for i, model in enumerate(models))
    assert pra.load(f"hub:bob/model@{first}").config == models[0].config
    assert pra.load("hub:bob/model").config == models[1].config
    assert pra.load(f"hub:bob/model@{second}").config == models[1].config
    refused(lambda: pra.load("hub:bob/model@v7"), "hub:bob/model@v7", "no such revision")


def test_what_loading_from_the_hub_refuses(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pra.save(random_model(), tmp_path / "model")
    publish(hub, model, "bob/gated", gated=True)
    publish(hub, model, "bob/private", private=True)
    (model / "model.safetensors").unlink()
    publish(hub, model, "bob/partial")
    (model / "config.json").write_text('{"architectures": ["Other"]}')
    publish(hub, model, "bob/other")
    hub.repositories["bob/empty"] = Repository(commits={"0" * 40: {}})
    hub.repositories["bob/other"].commit({"model.safetensors": b"large"})
    refused(lambda: pra.load("hub:bob/none"), "hub:bob/none is not on the Hub, or is private", "HF_TOKEN")
    refused(lambda: pra.load("hub:bob/private"), "hub:bob/private is not on the Hub, or is private")
    refused(lambda: pra.load("hub:bob/gated"), "hub:bob/gated is gated: accept its terms")
    refused(lambda: pra.load("hub:bob/partial"), "hub:bob/partial is no whole model of pra", "model.safetensors")
    refused(lambda: pra.load("hub:bob/other"), "hub:bob/other is no model of pra")
    refused(lambda: pra.load("hub:bob/empty"), "hub:bob/empty is no model of pra", "not there")
    assert not any(
        line.startswith("GET") and "other/resolve" in line and "safetensors" in line for line in hub.requests
    )
    for wrong in ("hub:bob", "hub:", "hub:a/b/c", "hub:bob/mo del"):
        refused(lambda wrong=wrong: pra.load(wrong), repr(wrong.removeprefix("hub:")), "user/model")
    refused(lambda: pra.load("hub:bob/--x"), "hub:bob/--x")  # the library's own rules
    assert cli.main(["sample", "hub:bob/none", "--out", str(tmp_path / "x.png")]) == 2
    assert "hub:bob/none is not on the Hub" in capsys.readouterr().err


def test_a_token_opens_what_is_private(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    publish(hub, pra.save(model, tmp_path / "model"), private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same_images(pra.load("hub:bob/model"), model)


def test_without_network_and_cache_one_line_says_so(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: pra.load("hub:bob/model"), "hub:bob/model", "cannot be reached", "repeat with a network")
    offline(monkeypatch)
    refused(lambda: pra.load("hub:bob/model"), "hub:bob/model", "HF_HUB_OFFLINE is set")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: pra.load("hub:bob/model"), "huggingface_hub", install_command("hub"))
    refused(lambda: pra.push(trained, "alice/tiny"), install_command("hub"))


def test_what_push_refuses(hub: Hub, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: pra.push(trained, "alice/tiny"), "no token to push hub:alice/tiny with", "hf auth login")
    refused(lambda: pra.push(trained, "tiny"), "'tiny'", "user/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(lambda: pra.push(trained, "alice/tiny"), "refuses hub:alice/tiny to this token (401)")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(lambda: pra.push(trained, "bob/tiny"), "refuses hub:bob/tiny to this token (403)")
    refused(lambda: pra.push(trained / "none", "alice/tiny"), "no run or model at")
    assert not hub.repositories


@pytest.mark.usefixtures("logged_in")
def test_private_holds_for_a_new_model_and_is_refused_for_a_public_one(hub: Hub, trained: Path) -> None:
    pra.push(trained, "alice/mine", private=True)
    assert hub.repositories["alice/mine"].private
    pra.push(trained, "alice/ours")
    before = dict(hub.repositories["alice/ours"].commits)
    refused(lambda: pra.push(trained, "alice/ours", private=True), "hub:alice/ours is public", "--private")
    assert hub.repositories["alice/ours"].commits == before


def test_a_dry_run_writes_what_a_push_uploads_and_needs_no_hub(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    out = tmp_path / "out"
    assert cli.main(["push", str(trained), "alice/tiny", "--dry-run", str(out), "--half", "--licence", "mit"]) == 0
    assert "nothing was uploaded to alice/tiny" in capsys.readouterr().out
    assert contents(out) == contents(pra.export(trained, tmp_path / "b", half=True, licence="mit", repo="alice/tiny"))


@pytest.mark.usefixtures("logged_in")
def test_the_command_line_takes_a_hub_address_where_it_takes_a_run(
    hub: Hub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(trained), "alice/tiny"]) == 0
    told = capsys.readouterr().out
    assert "/alice/tiny/commit/" in told
    assert "next: pra sample hub:alice/tiny" in told
    words = ["--labels", "3", "--seeds", "0-1", "--out"]
    # As a stranger's process, with the hub library's own variables.
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    command = [sys.executable, "-m", "pra", "sample", "hub:alice/tiny", *words, "grid.png"]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cli.main(["sample", str(trained), *words, str(tmp_path / "own.png")]) == 0
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "own.png").read_bytes()


def test_eval_takes_a_model_of_the_hub(
    hub: Hub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(hub, pra.export(trained, tmp_path / "model"))
    assert cli.main(["eval", "hub:bob/model", "--num", "20"]) == 2
    assert "hub:bob/model does not say which data it belongs to; give --reference" in capsys.readouterr().err


# --- the shipped model --------------------------------------------------------------------------------------


@pytest.fixture
def ships(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that ships a model."""
    folder = pra.export(trained, tmp_path / "shipped", half=True)
    monkeypatch.setattr(weights, "SHIPPED", folder)
    return folder


def test_the_shipped_model_is_simply_there(ships: Path, tmp_path: Path) -> None:
    assert same_images(pra.load(), pra.load(ships))
    pictures = tmp_path / "pictures"
    assert cli.main(["sample", "--labels", "4", "--seeds", "1-2", "--out", str(pictures)]) == 0
    assert len(list(pictures.iterdir())) == 2
    out = tmp_path / "continued.png"
    picture = next(pictures.iterdir())
    assert cli.main(["complete", str(picture), "--rows", "2", "--seeds", "1", "--out", str(out)]) == 0
    with Image.open(out) as continued:
        assert continued.size == (8, 8)


def test_its_card_says_how_to_load_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "shipped")
    card = (pra.export(trained, tmp_path / "shipped", half=True) / "README.md").read_text()
    assert "# tiny\n" in card
    assert "pra.load()" in card
    assert "$ pra sample --labels all" in card


def test_a_build_without_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "none")
    refused(pra.load, "ships no model", "hub:user/model", "pra train digits")
    assert cli.main(["sample", "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_lies_in_the_package_is_small_and_whole() -> None:
    assert {"README.md", "config.json", "model.safetensors"} <= set(contents(weights.SHIPPED))
    assert (weights.SHIPPED / "model.safetensors").stat().st_size <= 4e6
    assert pra.Sampler(pra.load()).sample([0], [0]).isfinite().all()
