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
"""Pixels per side: VGG-16 halves an image four times before its last features."""


def lpips_distance(model: ImageConfig, device: torch.device, pretrained: bool = True) -> Perceptual:
    """LPIPS with VGG-16 features, frozen.

    Args:
        model: the images' size and channels; one channel is shown to the network as grey.
        device: where it runs.
        pretrained: load torchvision's ImageNet weights (downloaded once by torchvision into its cache); False
            leaves the features random, for tests.

    Raises:
        PraError: images that the network cannot read, the extra is not installed, or the weights cannot be had.
    """
    if model.channels not in (1, 3):
        raise PraError(
            f"the perceptual loss reads 1 or 3 channels, not {model.channels}: set train.objective.perceptual_weight=0"
        )
    if min(model.image_size) < SMALLEST:
        raise PraError(
            f"the perceptual loss reads images of at least {SMALLEST}x{SMALLEST} pixels, not "
            f"{model.image_size[0]}x{model.image_size[1]}: set train.objective.perceptual_weight=0"
        )
    network = _network(pretrained).eval().requires_grad_(False).to(device)

    def distance(reconstruction: Tensor, image: Tensor) -> Tensor:
        shape = (-1, 3, -1, -1)
        return network(reconstruction.expand(shape), image.expand(shape)).flatten()  # type: ignore[no-any-return]

    return distance


def _network(pretrained: bool) -> Any:
    try:
        import lpips
    except (ImportError, RuntimeError, OSError) as error:
        reason = import_failed("the perceptual loss", "lpips and torchvision", "perceptual", error)
        raise PraError(f"{reason}, or set train.objective.perceptual_weight=0") from None
    try:
        with warnings.catch_warnings():  # torchvision's, about how lpips calls it
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a damaged download is a RuntimeError
        raise PraError(
            f"the VGG-16 weights of the perceptual loss cannot be had ({reason_of(error)}); put vgg16-397923af.pth "
            f"into {torch.hub.get_dir()}/checkpoints, or set train.objective.perceptual_weight=0"
        ) from None
