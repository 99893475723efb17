"""Loading from the Hub, as ``hub:user/model``."""

import shutil
import sys
from pathlib import Path

import torch
from support.files import change, contents, flip
from support.hub import TOKEN, Repository
from support.models import LEARNED, random_model
from support.refusal import refused

import pra
from pra import cli
from pra.commands.eval import evaluate_command
from pra.models import weights
from pra.utils.extras import install_command


def publish(hub, folder, name="bob/model", **changes):
    """Publish a folder on the fake Hub, and return the commit."""
    repository = hub.repositories.setdefault(name, Repository(**changes))
    return repository.commit(contents(folder))


def test_hub_models_load_by_revision_and_with_a_token(hub, tmp_path, monkeypatch):
    models = [random_model(), random_model(LEARNED, class_tokens=1)]
    first, second = (publish(hub, pra.save(model, tmp_path / str(i))) for i, model in enumerate(models))
    for address, model in ((f"@{first}", models[0]), ("", models[1]), (f"@{second}", models[1])):
        assert pra.load(f"hub:bob/model{address}").config == model.config
    refused(lambda: pra.load("hub:bob/model@v7"), code="unreachable", address="hub:bob/model@v7")
    refused(lambda: evaluate_command(Path("hub:bob/model"), num=20), "hub:bob/model", "--reference")
    publish(hub, tmp_path / "0", "bob/secret", private=True)
    refused(lambda: pra.load("hub:bob/secret"), "hub:bob/secret", "private", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert torch.equal(pra.load("hub:bob/secret").head.out.weight, models[0].head.out.weight)


def test_hub_repository_without_a_pra_model_is_refused(hub, tmp_path, capsys):
    model = pra.save(random_model(), tmp_path / "model")
    publish(hub, model, "bob/gated", gated=True)
    (model / "model.safetensors").unlink()
    publish(hub, model, "bob/partial")
    (model / "config.json").write_text('{"architectures": ["Other"]}')
    publish(hub, model, "bob/other")
    hub.repositories["bob/empty"] = Repository(commits={"0" * 40: {}})
    hub.repositories["bob/other"].commit({"model.safetensors": b"large"})
    for name, part in (
        ("none", "HF_TOKEN"), ("gated", "accept its terms"), ("partial", "model.safetensors"),
        ("other", "config.json"), ("empty", "config.json"),
    ):  # fmt: skip
        refused(lambda name=name: pra.load(f"hub:bob/{name}"), f"hub:bob/{name}", part)
    large = [line for line in hub.requests if "other/resolve" in line and "safetensors" in line]
    assert not any(line.startswith("GET") for line in large)
    for wrong in ("hub:bob", "hub:", "hub:a/b/c", "hub:bob/mo del"):
        refused(lambda wrong=wrong: pra.load(wrong), repr(wrong.removeprefix("hub:")), "user/model")
    refused(lambda: pra.load("hub:bob/--x"), "hub:bob/--x")  # a name that huggingface_hub refuses
    for command in (
        ["sample", "hub:bob/none", "--out", str(tmp_path / "x.png")],
        ["export", "hub:bob/other", str(tmp_path / "x")],
    ):
        assert cli.main(command) == 2
        assert command[1] in capsys.readouterr().err


def test_damaged_download_is_refused(hub, tmp_path):
    publish(hub, pra.save(random_model(), tmp_path / "model"))
    pra.load("hub:bob/model")
    [file] = (tmp_path / "cache").rglob("model.safetensors")
    flip(file.resolve())
    home = file.parents[2]
    refused(lambda: pra.load("hub:bob/model"), f"Remove {home} to download", code="unreadable", path=file)
    shutil.rmtree(home)
    pra.load("hub:bob/model")


def test_without_network_or_library_is_refused(hub, monkeypatch):
    hub.reachable = False
    refused(lambda: pra.load("hub:bob/model"), "hub:bob/model", "cannot be reached", code="unreachable")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: pra.load("hub:bob/model"), "hub:bob/model", "HF_HUB_OFFLINE is set", code="unreachable")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: pra.load("hub:bob/model"), "huggingface_hub", install_command("hub"), code="not-installed")


def test_bfloat16_weights_are_taken_and_integers_are_not(tmp_path):
    model = random_model()
    path = pra.save(model, tmp_path / "model") / "model.safetensors"
    change(path.parent / "config.json", sha256=None)
    weights.write_tensors({name: tensor.bfloat16() for name, tensor in model.state_dict().items()}, path)
    assert torch.equal(pra.load(path.parent).head.out.weight, model.head.out.weight.bfloat16().float())
    weights.write_tensors({name: tensor.int() for name, tensor in model.state_dict().items()}, path)
    refused(lambda: pra.load(path.parent), str(path), "int32")
