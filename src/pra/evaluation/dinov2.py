"""The extractor ``dinov2``: DINOv2's ViT-L/14 (2304.07193), whose Fréchet distance is FD-DINOv2 (2306.04675).

The network is timm's (extra ``dinov2``), the weights are Meta's own file; no code is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pra.errors import PraError
from pra.evaluation.features import Features, download, exact, rgb_blocks, weights_of
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


class DINOv2:
    """Class tokens after the last norm, ``(B, 1024)``; no spatial features and no logits.

    Images are resized as the evaluator of Stein et al. does by default: Pillow's bicubic to 224x224, in 8 bits. Grey
    ones are shown as RGB. Always in float32.
    """

    name = "dinov2"
    classes: tuple[str, ...] | None = None
    accuracy: float | None = None

    def __init__(self, network: Any, fingerprint: str, device: torch.device) -> None:
        self.fingerprint = fingerprint
        self.device = device
        self.dim = int(network.num_features)
        self._network = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """As :meth:`pra.evaluation.features.FeatureExtractor.__call__`; 1 or 3 channels of any size."""
        with exact(self.device):
            tokens = [self._network(prepare(block).to(self.device)) for block in rgb_blocks(images, self.name)]
        return Features(torch.cat(tokens), None, None)


def prepare(images: Tensor) -> Tensor:
    """Map uint8 images ``(B, 1 or 3, H, W)`` to the network's float32 ``(B, 3, 224, 224)``, normalised."""
    resized = np.stack([_resized(image) for image in images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()])
    values = torch.from_numpy(resized).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (values - mean) / std


def _resized(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    # By Pillow itself: torch's antialiased bicubic rounds otherwise, by several levels at sharp edges.
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def dinov2(weights: Path | None, device: torch.device, architecture: Mapping[str, Any] = VIT_L) -> DINOv2:
    """Open the extractor ``dinov2``.

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
    return DINOv2(network.float(), file_sha256(path), device)


def _positions(table: Tensor) -> Tensor:
    """Interpolate position embeddings ``(1, 1 + 37 * 37, D)`` of 518 pixels for 224, as DINOv2 does.

    By the factor ``16.1 / 37`` and not to the size 16, which gives other numbers; and without antialiasing.
    """
    before, after = round((table.shape[1] - 1) ** 0.5), SIDE // PATCH
    grid = table[:, 1:].float().mT.reshape(1, -1, before, before)
    grid = F.interpolate(grid, scale_factor=(after + 0.1) / before, mode="bicubic")
    return torch.cat([table[:, :1].float(), grid.flatten(2).mT], dim=1)
