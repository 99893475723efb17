"""Every `sh` and `python` block of the README and the docs runs, in order, in an empty folder.

Trainings are cut to a few steps of small batches, sets to a few images, the classifier of the features to one epoch.
`console` blocks, such as installation and long trainings, are parsed alone: test_docs_commands.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, blocks

from pra import cli

FASHION = Path("/usr/share/datasets/fashion-mnist")
STEPS = 4
IMAGES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, classifiers: Path) -> Path:
    """An empty folder in which `make demo` has left a (hardly trained) runs/demo."""
    if not FASHION.exists():
        pytest.skip(f"{FASHION} is not there: apt install dataset-fashion-mnist")
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    in_this_process(["train", "digits", "--run-dir", "runs/demo", "--steps", str(STEPS)], folder, "the demo")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    if "import PRAPipeline" in page.read_text() and importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_shim")  # diffusers imports it where it is
    for language, text in blocks(page, "sh", "python"):
        if language == "python":
            with here(folder):
                exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
            continue
        for line in map(shortened, text.splitlines()):
            words = shlex.split(line, comments=True)
            if words[:1] == ["pra"] and not set(line) & set("*|<>$&"):
                in_this_process(words[1:], folder, line)
            else:
                in_a_shell(line, folder)


@contextlib.contextmanager
def here(folder: Path) -> Iterator[None]:
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def in_this_process(words: Sequence[str], folder: Path, line: str) -> None:
    """The command as its script calls it, without the seconds that a new process takes to import torch."""
    with here(folder):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code or 0  # type: ignore[assignment]
    assert code == 0, line


def in_a_shell(command: str, folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def shortened(line: str) -> str:
    """Fewer steps of smaller batches, fewer images. The second command of a pair still takes more steps."""
    line = re.sub(r"--num \d+", f"--num {IMAGES}", line.partition(" #")[0])
    if not line.startswith("pra train"):
        return line
    command, _, asked = line.partition(" --steps ")
    batch = "" if "batch_size" in command else "--set train.batch_size=16"
    return f"{command} --steps {STEPS + 2 if asked else STEPS} {batch}"


def test_the_pages_have_blocks_and_the_pictures_they_show() -> None:
    assert sum(len(list(blocks(page, "sh", "python"))) for page in PAGES) >= 5
    for page in PAGES:
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).exists(), f"{page.name} shows {picture}, which is not there"
