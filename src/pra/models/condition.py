"""What an image is generated from: its class. A model owns its condition as a module.

A condition turns what the user asks for into prefix tokens, names the null condition that guidance needs, and drops
conditions in training. Nothing outside it knows how either is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ClassCondition(nn.Module):
    """Learned prefix tokens for each class, and for the null class of classifier-free guidance (2207.12598).

    A batch of conditions is a tensor of labels, ``(B,)`` int64 in ``[0, num_classes]``; the last is the null class.

    Args:
        num_classes: real classes.
        count: tokens that a class has.
        width: of a token.
    """

    def __init__(self, num_classes: int, count: int, width: int) -> None:
        super().__init__()
        self.null, self.count = num_classes, count
        self.embedding = nn.Embedding(num_classes + 1, count * width)

    def forward(self, labels: Tensor) -> Tensor:
        """The prefix tokens, ``(B,)`` to ``(B, count, width)``."""
        return self.embedding(labels).view(len(labels), self.count, -1)  # type: ignore[no-any-return]

    def null_like(self, labels: Tensor) -> Tensor:
        """As many null conditions."""
        return torch.full_like(labels, self.null)

    def drop(self, labels: Tensor, mask: Tensor) -> Tensor:
        """The null condition where ``mask`` ``(B,)`` is true, the given ones elsewhere."""
        return labels.masked_fill(mask, self.null)

    def rows_for(self, known: Sequence[str], classes: Sequence[str]) -> list[int]:
        """Which row of ``embedding`` each of other classes begins with, their null class last.

        Args:
            known: the names of this condition's classes.
            classes: the names of the others. A class known by name keeps its row; a new one takes the null class's.
        """
        places = {name: place for place, name in reversed(list(enumerate(known)))}
        return [*(places.get(name, self.null) for name in classes), self.null]
