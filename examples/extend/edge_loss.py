"""A loss term: differences between neighbouring pixels, in the reconstruction and in the image."""

from __future__ import annotations

import sys

from torch import Tensor

import pra


def edges(known: pra.LossInputs) -> Tensor | None:
    if known.decoded is None:  # a model without a codec decodes nothing
        return None
    error = known.model.unpatchify(known.decoded) - known.images
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def main(run: str) -> None:
    pra.train(pra.recipe("tiny"), run, losses={"edges": (0.5, edges)})


if __name__ == "__main__":
    main(*sys.argv[1:])
