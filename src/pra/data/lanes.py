"""The order of images that can only be read forward, from several places at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pra.data.images import Labels

LANES = 16
"""At most; one if the data set cannot be divided."""
PIECES = 1024
"""At most, of a data set."""
UNIT = 32
"""Images of one lane that follow each other."""


@dataclass(frozen=True)
class Lanes:
    """Images in pieces, each of which can be read from its beginning; lanes are consecutive pieces.

    An epoch takes :data:`UNIT` images of every lane in turn, starting at a multiple of that. So each worker meets the
    same few lanes again if the number of workers and the number of lanes, a power of two, have common factors.
    ``starts`` is the first image of each piece, followed by the number of images; ``window`` images are held at once.
    """

    starts: Labels
    window: int

    @property
    def count(self) -> int:
        """The number of lanes."""
        return 1 << min(len(self.starts) - 1, LANES).bit_length() - 1

    @property
    def lane_window(self) -> int:
        """Images of one lane that are held at once."""
        return max(1, self.window // self.count)

    def place(self, index: int) -> tuple[int, int, int]:
        """Return the lane, the piece, and the place in the piece of an image."""
        piece = int(np.searchsorted(self.starts, index, side="right")) - 1
        return piece * self.count // (len(self.starts) - 1), piece, index - int(self.starts[piece])

    def arranged(self, order: Tensor, start: int) -> Tensor:
        """Shuffle an epoch within the windows of each lane.

        ``order`` is a random order of all images, int64 ``(N,)``, and ``start`` the epoch's first global sample index.
        """
        sizes = torch.from_numpy(np.diff(self.starts))
        pieces = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        places = torch.arange(len(order)) - torch.from_numpy(self.starts[:-1])[pieces]
        # A piece has fewer images than the data set: windows of a later piece have higher numbers.
        windows = pieces * len(order) + places // self.lane_window
        order = order[windows[order].argsort(stable=True)]
        lanes = pieces * self.count // len(sizes)  # sorting by windows has kept each lane's places
        rank = torch.arange(len(order)) - torch.searchsorted(lanes, lanes)
        rank[lanes == 0] -= -start % UNIT  # the first images, up to the next multiple
        return order[(rank.div(UNIT, rounding_mode="floor") * self.count + lanes).argsort(stable=True)]
