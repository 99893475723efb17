"""Progress: bars on a terminal, lines in a log."""

import io

import pytest

from pra.utils import progress
from pra.utils.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def shown(stream, monkeypatch, seconds_per_step, **options):
    """The output of a bar of 100 steps."""
    now = [0.0]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(total=100, desc="train", mininterval=0, **options) as bar:
        for _ in range(100):
            now[0] += seconds_per_step
            bar.update()
    return stream.getvalue()


@pytest.mark.parametrize(("seconds", "lines"), [(0.01, 2), (1.0, 5), (60.0, 102)])
def test_progress_in_a_log_is_a_line_per_30_s(seconds, lines, monkeypatch):
    log = shown(io.StringIO(), monkeypatch, seconds)
    assert len(log.splitlines()) == lines
    assert all(line.startswith("train:") for line in log.splitlines())
    assert "100/100" in log.splitlines()[-1]
    assert not {"\r", "\x1b"} & set(log)


def test_progress_on_a_terminal_is_a_bar_or_nothing(monkeypatch):
    assert shown(Terminal(), monkeypatch, 0.01).count("\r") > 50
    assert shown(io.StringIO(), monkeypatch, 1.0, disable=True) == ""
