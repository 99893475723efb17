"""Images to raster-ordered patches and back."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, N, p*p*C)`` in raster order; a patch is laid out row, column, channel."""
    b, c, height, width = images.shape
    p = patch_size
    x = images.reshape(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """``(B, rows*columns, p*p*C)`` to ``(B, C, rows*p, columns*p)``, the inverse of :func:`patchify`."""
    b, _, size = patches.shape
    rows, columns = grid
    p = patch_size
    c = size // (p * p)
    x = patches.reshape(b, rows, columns, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, rows * p, columns * p)
