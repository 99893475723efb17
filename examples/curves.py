"""Draws the curves of several runs over each other, as those of docs/imagenet.md.

python examples/curves.py docs/images/curves-failing.png healthy=runs/healthy "rate 1"=runs/rate

A run is given as NAME=FOLDER, or as FOLDER alone. A figure of an earlier call is replaced.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pra import PraError
from pra.images import write_atomically
from pra.train.plots import curves
from pra.train.run import read_metrics

SHOWN = ("flow", "reconstruction", "state_std")
HIGHEST = 3
"""The axes' end, in the highest value of the first run."""


def main(out: Path, runs: dict[str, Path]) -> None:
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    for name, folder in runs.items():
        if not metrics[name]:
            raise PraError(f"{folder} has no metrics.jsonl, or nothing in it; give the folder of a run")
    figure, first = curves(metrics, SHOWN), next(iter(metrics.values()))
    for axes, name in zip(figure.axes, SHOWN, strict=True):  # a loss that explodes would hide the others
        axes.set_ylim(top=min(axes.get_ylim()[1], HIGHEST * max(row[name] for row in first)))
    write_atomically(out, lambda file: figure.savefig(file, format="png", dpi=110))


def parse(words: list[str]) -> tuple[Path, dict[str, Path]]:
    """The figure and the runs by their names."""
    if len(words) < 2:
        raise PraError("give the figure and at least one run: FILE.png NAME=RUN ...")
    pairs = [word.rpartition("=") for word in words[1:]]
    return Path(words[0]), {name or Path(folder).name: Path(folder) for name, _, folder in pairs}


if __name__ == "__main__":
    try:
        main(*parse(sys.argv[1:]))
    except PraError as error:
        print(f"curves: error: {error}", file=sys.stderr)
        sys.exit(2)
