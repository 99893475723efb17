"""All tests of training: runs of a few steps, whose states may vary little, draw no curves."""

from pathlib import Path

import pytest
from support.training import tiny, train

from pra.training import callbacks


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:a state dimension varies little"))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Do not draw curves in commands either."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """Six steps of ``tiny`` without a stop, and a checkpoint of each. To be read only."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(tiny("train.steps=6", "train.checkpoint_every=1", "train.keep_checkpoints=9", "train.log_every=2"), folder)
    return folder
