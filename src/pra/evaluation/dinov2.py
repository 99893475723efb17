"""The extractor ``dinov2``: DINOv2's ViT-L/14 (2304.07193), whose Fréchet distance is FD-DINOv2 (2306.04675).

The network is timm's (extra ``dinov2``), the weights are Meta's own file; no code is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pra.errors import PraError
from pra.evaluation.features import Features, Published, download, weights_of
from pra.utils.extras import import_failed
from pra.utils.provenance import file_sha256

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
"""Of the file behind ``URL``. Meta publishes none; this is what many who have the file have recorded."""

VIT_L: Mapping[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
PATCH = 14
SIDE = 224
"""Pixels of the images that the network sees."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's."""


def prepare(images: Tensor) -> Tensor:
    """Map uint8 images ``(B, 3, H, W)`` to the network's float32 ``(B, 3, 224, 224)``, normalised.

    Resized as the evaluator of Stein et al. does by default, by Pillow's bicubic in 8 bits: torch's antialiased bicubic
    rounds otherwise, by several levels at sharp edges.
    """
    pictures = map(Image.fromarray, images.permute(0, 2, 3, 1).cpu().numpy())
    resized = [np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for picture in pictures]
    values = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (values - mean) / std


def dinov2(weights: Path | None, device: torch.device, architecture: Mapping[str, Any] = VIT_L) -> Published:
    """Open the extractor ``dinov2``: class tokens after the last norm, ``(B, 1024)``; no spatial features, no logits.

    ``weights`` is Meta's ``dinov2_vitl14_pretrain.pth``; None downloads that into torch's cache once. ``architecture``
    is smaller in tests. Refuse weights that cannot be had or read; needs the extra.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError, OSError) as error:
        text = import_failed("--features dinov2", "timm and torchvision", "dinov2", error)
        raise PraError(text, "not-installed") from None
    path = weights or download(URL, SHA256, "dinov2")
    with weights_of(path, "DINOv2's ViT-L/14"):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors.pop("mask_token")  # of the training only
        tensors["pos_embed"] = _positions(tensors["pos_embed"])
        with torch.device("meta"):
            network = VisionTransformer(img_size=SIDE, patch_size=PATCH, num_classes=0, init_values=1.0, **architecture)
        network.load_state_dict(tensors, assign=True)
    network = network.float().to(device).eval().requires_grad_(False)
    dim, fingerprint = int(network.num_features), file_sha256(path)
    return Published(
        "dinov2", dim, fingerprint, device, lambda images: Features(network(prepare(images).to(device)), None, None)
    )


def _positions(table: Tensor) -> Tensor:
    """Interpolate position embeddings ``(1, 1 + 37 * 37, D)`` of 518 pixels for 224, as DINOv2 does.

    By the factor ``16.1 / 37`` and not to the size 16, which gives other numbers; and without antialiasing.
    """
    before, after = round((table.shape[1] - 1) ** 0.5), SIDE // PATCH
    grid = table[:, 1:].float().mT.reshape(1, -1, before, before)
    grid = F.interpolate(grid, scale_factor=(after + 0.1) / before, mode="bicubic")
    return torch.cat([table[:, :1].float(), grid.flatten(2).mT], dim=1)
