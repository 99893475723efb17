"""LPIPS in the reconstruction loss: the real package, with random features (nothing is downloaded)."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import pra
from pra.config import CodecConfig, EncoderConfig, ModelConfig, RunConfig, TransformerConfig
from pra.errors import PraError
from pra.method import perceptual
from pra.method.objectives import Perceptual
from pra.utils import extras
from pra.utils.extras import install_command

CPU = torch.device("cpu")


def model_config(channels: int = 3, size: tuple[int, int] = (32, 32)) -> ModelConfig:
    return dataclasses.replace(pra.recipe("tiny").model, image_size=size, channels=channels, patch_size=8)


@pytest.fixture(scope="module")
def features(torchvision_shim: None) -> torch.nn.Module:
    """LPIPS with random features, built once: VGG-16 takes its time."""
    torch.manual_seed(0)  # lpips draws them from the global state
    network: torch.nn.Module = perceptual.load_network(pretrained=False)
    return network


@pytest.fixture
def random_features(features: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """These features, wherever the product builds the network."""
    monkeypatch.setattr(perceptual, "load_network", lambda pretrained: features)
    return features


def build(channels: int = 3, size: tuple[int, int] = (32, 32)) -> Perceptual:
    return perceptual.lpips_distance(model_config(channels, size), CPU)


def pictures(channels: int, seed: int, count: int = 2) -> Tensor:
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.usefixtures("random_features")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_distance_per_image_that_falls_with_the_difference(channels: int) -> None:
    distance = build(channels)
    image, other = pictures(channels, 0), pictures(channels, 1)
    assert distance(image, image).tolist() == [0.0, 0.0]
    near, far = distance(image + 0.05 * other, image), distance(image + 0.5 * other, image)
    assert near.shape == (2,)
    assert (near > 0).all()
    assert (near < far).all()


@pytest.mark.usefixtures("random_features")
def test_grey_is_shown_as_three_equal_channels() -> None:
    image, other = pictures(1, 0), pictures(1, 1)
    grey, colour = build(1), build(3)
    assert torch.equal(grey(image, other), colour(image.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_the_network_is_frozen_and_only_the_reconstruction_gets_a_gradient(random_features: torch.nn.Module) -> None:
    random_features.train().requires_grad_(True)
    distance = build()
    image = pictures(3, 0)
    reconstruction = pictures(3, 1).requires_grad_()
    distance(reconstruction, image).sum().backward()
    assert reconstruction.grad is not None
    assert reconstruction.grad.isfinite().all()
    assert reconstruction.grad.abs().max() > 0
    assert image.grad is None
    assert not any(module.training for module in random_features.modules())
    assert all(not p.requires_grad and p.grad is None for p in random_features.parameters())


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (model_config(2), "reads 1 or 3 channels, not 2"),
        (model_config(4), "reads 1 or 3 channels, not 4"),
        (model_config(3, (8, 32)), "at least 16x16 pixels, not 8x32"),
    ],
)
def test_images_that_it_cannot_read(config: ModelConfig, part: str) -> None:
    with pytest.raises(PraError, match=part) as raised:
        perceptual.lpips_distance(config, CPU)
    assert "train.objective.perceptual_weight=0" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("random_features")
def test_sixteen_pixels_are_enough() -> None:
    distance = build(3, (16, 16))
    assert distance(pictures(3, 0)[..., :16, :16], pictures(3, 1)[..., :16, :16]).isfinite().all()


@pytest.mark.parametrize("missing", ["lpips", "torchvision"])
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for imported in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, imported)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(PraError, match=re.escape(install_command("perceptual"))) as raised:
        pra.train(rgb_run(tmp_path), tmp_path / "run", device="cpu", progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["RuntimeError", "OSError"])
def test_a_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It is installed: to install the extra would not help."""
    for imported in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, imported)
    (tmp_path / "lpips.py").write_text(f"raise {kind}('operator torchvision::nms\\ndoes not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extras, "package_version", lambda name: "0.99.0+cu130")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(PraError) as raised:
        perceptual.load_network(pretrained=False)
    message = str(raised.value)
    assert "torchvision 0.99.0+cu130 does not fit torch 2.9.1+cpu (operator torchvision::nms does not exist)" in message
    assert "'torchvision==0.24.*'" in message
    assert "train.objective.perceptual_weight=0" in message
    assert "pip install -e" not in message


@pytest.mark.usefixtures("torchvision_shim")
@pytest.mark.parametrize("problem", [OSError("no network"), RuntimeError("invalid hash value\n(expected x)")])
def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    import lpips

    def fail(**_: Any) -> None:
        raise problem

    monkeypatch.setattr(lpips, "LPIPS", fail)
    with pytest.raises(PraError, match=r"put vgg16-397923af.pth into .*checkpoints") as raised:
        perceptual.lpips_distance(model_config(), CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("random_features")
def test_it_changes_the_codec_and_nothing_else_in_one_step(tmp_path: Path) -> None:
    config = rgb_run(tmp_path)
    without = dataclasses.replace(config.train.objective, perceptual_weight=0.0)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, objective=without))
    moved = pra.train(config, tmp_path / "with", device="cpu", progress=False).model
    still = pra.train(plain, tmp_path / "without", device="cpu", progress=False).model
    pairs = zip(moved.named_parameters(), still.parameters(), strict=True)
    changed = {name.split(".")[0] for (name, a), b in pairs if not torch.equal(a, b)}
    assert changed == {"codec"}


def test_a_model_without_a_codec_does_not_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    config = rgb_run(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, codec=None))
    assert pra.train(config, tmp_path / "run", device="cpu", progress=False).new_steps == 1


def rgb_run(tmp_path: Path) -> RunConfig:
    """One step on two colour images of 32x32, with a perceptual loss. The gradient is not clipped: clipping would
    couple the codec with the rest."""
    for index in range(2):
        path = tmp_path / "data" / "class" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    tiny = pra.recipe("tiny")
    codec = CodecConfig(
        state_dim=4,
        encoder=EncoderConfig(depth=1, width=32),
        decoder=TransformerConfig(depth=1, width=32, heads=2),
    )
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(model_config(), num_classes=1, codec=codec),
        data=dataclasses.replace(tiny.data, source=f"folder:{tmp_path / 'data'}"),
        train=dataclasses.replace(
            tiny.train,
            steps=1,
            batch_size=2,
            sample_every=0,
            objective=dataclasses.replace(tiny.train.objective, perceptual_weight=1.0),
            optimizer=dataclasses.replace(tiny.train.optimizer, clip=1e9),
        ),
    )
