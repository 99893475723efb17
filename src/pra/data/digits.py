"""scikit-learn's bundled handwritten digits: 1797 grey images of 8x8."""

from __future__ import annotations

import numpy as np

from pra.data.images import ArraySource, not_installed


def open_digits(name: str, test: bool) -> ArraySource:
    """Open one split: every sixth image is for testing. Values 0..16 become 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise not_installed(name, "scikit-learn", "train", error) from None
    data = load_digits()
    chosen = (np.arange(len(data.target)) % 6 == 5) == test
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(name, images, data.target[chosen].astype(np.int64), tuple("0123456789"))
