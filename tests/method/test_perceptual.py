"""LPIPS in the reconstruction loss: the real package, with random features (nothing is downloaded)."""

import dataclasses
import sys

import pytest
import torch
from support.data import noisy
from support.refusal import refused
from support.training import train

import pra
from pra.config import apply_settings
from pra.method import perceptual
from pra.method.perceptual import OFF
from pra.models.base import NoDraws
from pra.utils import extras
from pra.utils.extras import install_command


def model_config(channels=3, size=(32, 32)):
    return dataclasses.replace(pra.recipe("tiny").model, image_size=size, channels=channels, patch_size=8)


@pytest.fixture(scope="module")
def features(torchvision_shim):
    """LPIPS with random features. VGG-16's classifier, which LPIPS leaves out, would take most of the time to draw."""
    with NoDraws():
        network = perceptual.load_network(pretrained=False)
    torch.manual_seed(0)
    for module in network.net.modules():  # type: ignore[union-attr]
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    return network


@pytest.fixture
def random_features(features, monkeypatch):
    """Use ``features`` wherever the package builds the network."""
    monkeypatch.setattr(perceptual, "load_network", lambda pretrained: features)
    return features


def build(channels=3, size=(32, 32)):
    return perceptual.lpips_distance(model_config(channels, size), torch.device("cpu"))


def pictures(channels, seed, count=2):
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.usefixtures("random_features")
@pytest.mark.parametrize("channels", [1, 3])
def test_distance_falls_with_the_difference(channels):
    distance = build(channels)
    image, other = pictures(channels, 0), pictures(channels, 1)
    assert distance(image, image).tolist() == [0.0, 0.0]
    near, far = distance(image + 0.05 * other, image), distance(image + 0.5 * other, image)
    assert near.shape == (2,)
    assert (near > 0).all()
    assert (near < far).all()
    if channels == 1:  # grey is shown as three equal channels
        assert torch.equal(near, build(3)(*((image + x).expand(-1, 3, -1, -1) for x in (0.05 * other, 0 * other))))
    small = build(channels, (16, 16))
    assert small(image[..., :16, :16], other[..., :16, :16]).isfinite().all()


def test_network_is_frozen(random_features):
    """Only the reconstruction gets a gradient."""
    random_features.train().requires_grad_(True)
    distance = build()
    image, reconstruction = pictures(3, 0), pictures(3, 1).requires_grad_()
    distance(reconstruction, image).sum().backward()  # type: ignore[no-untyped-call]
    assert reconstruction.grad is not None
    assert reconstruction.grad.isfinite().all()
    assert reconstruction.grad.abs().max() > 0
    assert not any(module.training for module in random_features.modules())
    assert all(not p.requires_grad and p.grad is None for p in random_features.parameters())


@pytest.mark.parametrize(("channels", "size", "given"), [(2, (32, 32), "2"), (4, (32, 32), "4"), (3, (8, 32), "8x32")])
def test_images_that_the_network_cannot_read(channels, size, given):
    refused(lambda: build(channels, size), given, OFF, code="unsupported")


def test_missing_lpips_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    config, folder = rgb_run(tmp_path), tmp_path / "run"
    refused(lambda: train(config, folder), install_command("perceptual"), OFF, code="not-installed")
    assert not folder.exists()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, codec=None))
    assert train(config, folder).new_steps == 1  # it needs no lpips


@pytest.mark.parametrize("kind", ["RuntimeError", "OSError"])
def test_torchvision_of_another_torch_is_named(tmp_path, monkeypatch, kind):
    """torchvision is installed, so the error must not advise to install the extra."""
    for imported in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, imported)
    (tmp_path / "lpips.py").write_text(f"raise {kind}('operator torchvision::nms\\ndoes not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extras, "package_version", lambda name: "0.99.0+cu130")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    fits = "torchvision 0.99.0+cu130 does not fit torch 2.9.1+cpu (operator torchvision::nms does not exist)"
    refused(lambda: perceptual.load_network(pretrained=False), fits, "'torchvision==0.24.*'", OFF)


@pytest.mark.usefixtures("torchvision_shim")
@pytest.mark.parametrize("problem", [OSError("no network"), RuntimeError("invalid hash value\n(expected x)")])
def test_weights_that_cannot_be_downloaded(monkeypatch, problem):
    import lpips

    def fail(**_):
        raise problem

    monkeypatch.setattr(lpips, "LPIPS", fail)
    refused(build, "vgg16-397923af.pth", "checkpoints", OFF, code="unreachable")


@pytest.mark.usefixtures("random_features")
def test_perceptual_loss_changes_the_codec_alone(tmp_path):
    config = rgb_run(tmp_path)
    moved = train(config, tmp_path / "with").model
    still = train(apply_settings(config, ["train.objective.perceptual_weight=0"]), tmp_path / "without").model
    pairs = zip(moved.named_parameters(), still.parameters(), strict=True)
    changed = {name.split(".")[0] for (name, a), b in pairs if not torch.equal(a, b)}
    assert changed == {"codec"}


def rgb_run(tmp_path):
    """One step on two colour images with a perceptual loss. Clipping would couple the codec with the rest."""
    for index in range(2):
        noisy(tmp_path / "data" / "class" / f"{index}.png", (32, 32), seed=index)
    one = dataclasses.replace(pra.recipe("tiny"), model=dataclasses.replace(model_config(), num_classes=1))
    settings = ["train.steps=1", "train.batch_size=2", "train.sample_every=0", "train.optimizer.clip=1e9"]
    settings += ["train.objective.perceptual_weight=1", f"data.source=folder:{tmp_path / 'data'}"]
    return apply_settings(one, settings)
