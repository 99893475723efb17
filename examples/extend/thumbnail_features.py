"""A feature extractor, `--features thumbnails`: 4 x 4 grey pixels of every image."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import pra
from pra import cli
from pra.evaluation import Features


class Thumbnails:
    name, dim = "thumbnails", 16
    fingerprint = hashlib.sha256(b"thumbnails, version 1").hexdigest()  # figures of other features do not compare
    classes, accuracy = None, None

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        self.device = device

    def __call__(self, images: Tensor) -> Features:
        grey = images.to(self.device, torch.float32).mean(dim=1) / 255
        return Features(adaptive_avg_pool2d(grey, 4).flatten(1), spatial=None, logits=None)


def main(run: str) -> None:
    pra.register_features("thumbnails", Thumbnails)
    sys.exit(cli.main(["eval", run, "--features", "thumbnails", "--num", "64", "--reference", "digits@test"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
