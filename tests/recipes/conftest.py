"""``pra train`` in this process, for every recipe that is chosen."""

import math

import pytest

from pra import cli
from pra.recipes import own
from pra.training import callbacks


@pytest.fixture
def train(capsys, monkeypatch):
    """``pra train`` on the CPU without pictures, curves and report: its code and all that it said.

    A step takes a second as far as it knows, and the length is not planned again when it takes less.
    """
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    monkeypatch.setattr("pra.commands.train.write_report", lambda run: None)
    monkeypatch.setattr(own, "seconds_per_step", lambda config, device: 1.0)
    monkeypatch.setattr(callbacks, "NEARLY", math.inf)

    def call(*arguments):
        code = cli.main(["train", *map(str, arguments), "--device", "cpu", "--set", "train.sample_every=0"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call
