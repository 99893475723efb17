"""scikit-learn's bundled handwritten digits: 1797 grey images of 8x8."""

from __future__ import annotations

import numpy as np

from pra.data.images import ArraySource
from pra.errors import PraError
from pra.utils.extras import install_command


def open_digits(name: str, test: bool) -> ArraySource:
    """Every sixth image is for testing, the others for training. Values 0..16 become 0..255.

    Raises:
        PraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise PraError(f"data source {name!r} needs scikit-learn; {install_command('train')}") from None
    data = load_digits()
    chosen = (np.arange(len(data.target)) % 6 == 5) == test
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    labels = data.target[chosen].astype(np.int64)
    return ArraySource(name, images, labels, tuple(str(digit) for digit in range(10)))
