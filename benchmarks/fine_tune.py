"""Fine-tunes a run at several rates and lengths, and measures the losses on pictures that it has not seen.

    python benchmarks/fine_tune.py runs/own-icons folder:more OUT
    python benchmarks/fine_tune.py runs/own-icons folder:more OUT --scratch 200 800   # and from scratch

Every other picture of the source is for training, the rest to be measured on: their losses under the moving average,
means over draws of noise that are the same for all. Flow losses compare as long as the states do, which fine-tuning
moves but little (the pixel loss tells); a model trained from scratch has its own states. The auxiliary loss,
what the backbone alone knows of the next patch's pixels, compares between all.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from tyro.conf import Positional, arg

import pra
from pra.config import RunConfig
from pra.data import Source, load_images, open_source
from pra.data.survey import look
from pra.method import noise
from pra.method.objectives import training_losses
from pra.models import Model, build_model, weights
from pra.recipes import fine_tune
from pra.training.initial import with_classes
from pra.training.run import read_run
from pra.utils.pixels import from_uint8

DRAWS = 4


class Half:
    """Every other image of a source, from the first or the second on."""

    def __init__(self, source: Source, start: int) -> None:
        self.name, self.classes, self.labels = source.name, source.classes, source.labels[start::2]
        self._source, self._start = source, start

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """See the source's."""
        return self._source.image(2 * index + self._start)

    def where(self, index: int) -> str:
        """See the source's."""
        return self._source.where(2 * index + self._start)


def main(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    data: Annotated[Positional[str], arg(metavar="SRC")],
    out: Annotated[Positional[Path], arg(metavar="DIR")],
    *,
    lower: tuple[float, ...] = (1, 4, 10),
    steps: tuple[int, ...] = (50, 200),
    scratch: tuple[int, ...] = (),
) -> None:
    """Prints a line per fine-tuning, and one for the model before.

    Args:
        run: The run to fine-tune.
        data: The pictures.
        out: Where the new runs go.
        lower: Divisors of the run's learning rate.
        steps: Lengths.
        scratch: Lengths of trainings of the same model that begin from nothing, at the run's own rate.
    """
    source, before = open_source(data), weights.load(run)
    halves = Half(source, 0), Half(source, 1)
    model = build_model(replace(before.config, num_classes=len(source.classes)))
    model.load_state_dict(with_classes(before, source.classes))
    config = read_run(run)
    print(f"{len(halves[0])} pictures to train on, {len(halves[1])} to measure on")
    print(f"before           {losses(model, halves[1], config)}", flush=True)
    survey = look(halves[0])
    wanted = [("rate /", divisor, length) for divisor in lower for length in steps]
    for way, divisor, length in [*wanted, *(("scratch", 1.0, length) for length in scratch)]:
        new, _ = fine_tune.propose(str(run), before, config, survey, None, length, torch.device("cpu"))
        rates = config.train.optimizer.slower(divisor)
        optimizer = replace(new.train.optimizer, lr=rates.lr, matrices=rates.matrices)
        new = replace(new, train=replace(new.train, optimizer=optimizer, sample_every=0))
        if way == "scratch":
            new = replace(new, initial=None, train=replace(new.train, codec_warmup=config.train.codec_warmup))
        place = out / f"{way.rstrip(' /')}-{divisor:g}-{length}"
        trained = pra.train(new, place, device="cpu", source=halves[0], progress=False)
        print(f"{way:7} {divisor:<3g} {length:4} {losses(trained.model, halves[1], new)}", flush=True)


@torch.no_grad()
def losses(model: Model, source: Source, config: RunConfig) -> str:
    pixels, labels = load_images(
        source, range(len(source)), model.config.image_size, model.config.channels, config.data
    )
    objective = replace(config.train.objective, class_dropout=0.0)
    means: dict[str, float] = {}
    for draw in range(DRAWS):
        keys = noise.keys(draw, torch.arange(len(source)))
        found = training_losses(model, from_uint8(pixels), labels, keys, objective, config.train.rollout)
        for name, value in found.terms.items():
            means[name] = means.get(name, 0.0) + float(value) / DRAWS
    return ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())


if __name__ == "__main__":
    tyro.cli(main)
