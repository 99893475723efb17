"""LPIPS (arXiv 1801.03924) through the ``lpips`` package, extra ``perceptual``."""

from __future__ import annotations

import torch
from torch import Tensor

from pra.errors import PraError
from pra.objectives import Perceptual


def lpips_distance(device: torch.device, pretrained: bool = True) -> Perceptual:
    """LPIPS with VGG-16 features, frozen.

    Args:
        device: where it runs.
        pretrained: load torchvision's ImageNet weights (downloaded once by torchvision into its cache); False
            leaves the features random, for tests.

    Raises:
        PraError: the extra is not installed, or the weights cannot be had.
    """
    try:
        import lpips
    except ImportError as error:
        raise PraError(
            f"the perceptual loss needs the package lpips ({error}): pip install 'pra[perceptual]', "
            "or set train.objective.perceptual_weight=0"
        ) from None
    try:
        network = lpips.LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
    except OSError as error:  # urllib's errors are OSErrors
        raise PraError(
            f"the VGG-16 weights of the perceptual loss cannot be downloaded ({error}); put vgg16-397923af.pth into "
            f"{torch.hub.get_dir()}/checkpoints, or set train.objective.perceptual_weight=0"
        ) from None
    network = network.eval().requires_grad_(False).to(device)

    def distance(reconstruction: Tensor, image: Tensor) -> Tensor:
        if image.shape[1] == 1:
            reconstruction, image = reconstruction.expand(-1, 3, -1, -1), image.expand(-1, 3, -1, -1)
        if image.shape[1] != 3:
            raise PraError(f"the perceptual loss reads 1 or 3 channels, not {image.shape[1]}: set its weight to 0")
        return network(reconstruction, image).flatten()  # type: ignore[no-any-return]

    return distance
