"""All tests of training: runs of a few steps, whose states may vary little, draw no curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from pra.training import callbacks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:a state dimension varies little"))


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the steps."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
