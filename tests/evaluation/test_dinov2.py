"""The extractor ``dinov2`` on random weights of a tiny network, in the layout of Meta's file."""

import importlib.util

import pytest
import torch
from PIL import Image
from support.refusal import refused

from pra.evaluation.features import VIT_L, dinov2, prepare
from pra.utils.provenance import file_sha256

CPU = torch.device("cpu")
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def timm(torchvision_shim):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install 'pra-pixels[dinov2]'")
    from timm.models import vision_transformer

    return vision_transformer


@pytest.fixture(scope="module")
def weights(timm, tmp_path_factory):
    """Write weights as Meta's file has them: made for 518 pixels, with the training's mask token."""
    network = timm.VisionTransformer(img_size=518, patch_size=14, num_classes=0, init_values=1.0, **TINY)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.5 for name, t in network.state_dict().items()}
    path = tmp_path_factory.mktemp("dinov2") / "random.pth"
    torch.save(tensors | {"mask_token": torch.zeros(1, 32)}, path)
    return path


def pixels(count, size=(20, 26)):
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 4, 5, generator=generator) * 255  # so that images differ when they are resized
    return torch.nn.functional.interpolate(coarse, size=size).to(torch.uint8)


def test_the_paper_s_network_has_1024_features_in_24_layers(timm):
    with torch.device("meta"):
        network = timm.VisionTransformer(img_size=518, patch_size=14, num_classes=0, init_values=1.0, **VIT_L)
    # As in Meta's file but for its mask token of 1024.
    assert sum(parameter.numel() for parameter in network.parameters()) == 304_368_640 - 1024


def test_the_network_is_dinov2s(weights):
    """Written out after Meta's: positions by the factor 16.1 / 37, pre-norm scaled branches, class token."""
    w, images, extractor = torch.load(weights, weights_only=True), pixels(2), dinov2(weights, CPU, TINY)
    pool, spatial, logits = extractor(images)
    assert (pool.shape, pool.dtype, spatial, logits) == ((2, extractor.dim), torch.float32, None, None)
    assert torch.allclose(torch.cat([extractor(image.unsqueeze(0)).pool for image in images]), pool, atol=1e-5)
    assert pool.std(dim=0).mean() > 1e-2
    assert extractor.fingerprint == file_sha256(weights)
    patches = torch.nn.functional.conv2d(
        prepare(images), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14
    )
    table = w["pos_embed"][:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    table = torch.cat([w["pos_embed"][:, :1], table.permute(0, 2, 3, 1).reshape(1, 256, 32)], dim=1)
    x = torch.cat([w["cls_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1) + table

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        return torch.nn.functional.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).view(2, 257, 3, 2, 16).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1) @ v
        x = x + w[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = torch.nn.functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + w[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
    assert torch.allclose(pool, norm("norm", x)[:, 0], atol=1e-4)


def test_images_are_resized_and_normalised_as_torchvision_does(timm):
    from torchvision import transforms

    steps = [
        transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    for image in (pixels(1, size=(32, 48)), pixels(1, size=(300, 256))):
        expected = transforms.Compose(steps)(Image.fromarray(image[0].permute(1, 2, 0).numpy()))
        assert torch.allclose(prepare(image)[0], expected, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------------------


def test_weights_that_are_not_dinov2s_are_refused(timm, weights, tmp_path):
    for path in (tmp_path / "w.pth", weights):  # the second of another size than ViT-L
        refused(lambda path=path: dinov2(path, CPU), code="unreadable", path=path)
