"""LPIPS (arXiv 1801.03924) through the ``lpips`` package, extra ``perceptual``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pra.config import ImageConfig
from pra.errors import PraError, reason_of
from pra.method.objectives import Perceptual
from pra.utils.extras import import_failed

SMALLEST = 16
"""Fewest pixels per side: VGG-16 halves an image four times before its last features."""

OFF = "Set train.objective.perceptual_weight=0"


def lpips_distance(model: ImageConfig, device: torch.device, pretrained: bool = True) -> Perceptual:
    """Build LPIPS with frozen VGG-16 features.

    Args:
        model: gives the size and the channels of the images. A single channel is repeated three times.
        device: of the network.
        pretrained: load torchvision's ImageNet weights, downloaded once; else the features stay random, for tests.

    Raises:
        PraError: the network cannot read such images, the extra is not installed, or the weights cannot be loaded.
    """
    if model.channels not in (1, 3):
        raise PraError(f"the perceptual loss reads 1 or 3 channels, not {model.channels}. {OFF}", "unsupported")
    if min(model.image_size) < SMALLEST:
        size, least = "x".join(map(str, model.image_size)), f"{SMALLEST}x{SMALLEST}"
        raise PraError(f"the perceptual loss reads images of at least {least} pixels, not {size}. {OFF}", "unsupported")
    network = load_network(pretrained).eval().requires_grad_(False).to(device)

    def distance(reconstruction: Tensor, image: Tensor) -> Tensor:
        shape = (-1, 3, -1, -1)
        return network(reconstruction.expand(shape), image.expand(shape)).flatten()  # type: ignore[no-any-return]

    return distance


def load_network(pretrained: bool) -> Any:
    """Load LPIPS. Refuse if the package or its weights are missing."""
    try:
        import lpips
    except (ImportError, RuntimeError, OSError) as error:
        reason = import_failed("the perceptual loss", "lpips and torchvision", "perceptual", error)
        raise PraError(f"{reason}. {OFF} to do without", code="not-installed", name="lpips") from None
    try:
        with warnings.catch_warnings():  # torchvision warns of an argument that lpips passes
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a damaged download is a RuntimeError
        problem = f"the VGG-16 weights of the perceptual loss cannot be loaded ({reason_of(error)})"
        fix = f"Put vgg16-397923af.pth into {torch.hub.get_dir()}/checkpoints. {OFF} to do without"
        raise PraError(f"{problem}. {fix}", code="unreachable") from None
