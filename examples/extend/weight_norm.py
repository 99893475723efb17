"""A callback: the norm of the weights in metrics, curves and report; a line for every picture that is drawn."""

from __future__ import annotations

import sys

import torch

import pra
from pra.training.loop import Trainer


class WeightNorm(pra.Callback):
    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        norms = torch._foreach_norm([weight.detach() for weight in trainer.model.parameters()])
        row["weight_norm"] = torch.stack(norms).norm().item()

    def on_sample(self, trainer: Trainer) -> None:
        if trainer.world.is_first:
            print(f"step {trainer.step}: {trainer.picture('samples')}")


def main(run: str) -> None:
    pra.train(pra.recipe("tiny"), run, callbacks=[WeightNorm()])


if __name__ == "__main__":
    main(*sys.argv[1:])
