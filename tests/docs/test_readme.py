"""Every `sh` and `python` block of the README and the docs runs, cut, in order, and some commands of the others."""

import contextlib
import importlib.util
import itertools
import re
import runpy
import shlex
import warnings
from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, blocks, command_lines

from pra import cli
from pra.commands import train
from pra.evaluation import probe
from pra.training import callbacks

FASHION = Path("/usr/share/datasets/fashion-mnist")
SHORTER = {
    r" +#.*": "",
    r"--steps \d{2,}": "--steps 6",  # the second command of a pair still takes more steps
    r"^(pra train (?!.*--steps).*)": r"\1 --steps 4",
    r"train digits": "train tiny",
    r"(--from \S+)": r"\1 --set data.validation=0.001 --set train.batch_size=8",
    r"show pra-l-256": "show tiny",
    r"--num \d+": "--num 40",
    r"(--layers?) 3": r"\1 1",
    r"_every=100": "_every=2",
    r"--seeds 0-\d+": "--seeds 0-1",
    r"runs/own-icons": "runs/demo",
}
"""Replacements in a command that make it fast."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, classifiers):
    """An empty folder in which `make demo` has left a (hardly trained) runs/demo."""
    if not FASHION.exists():
        pytest.skip(f"{FASHION} is not there: apt install dataset-fashion-mnist")
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "EPOCHS", 1)
        with here(folder):
            execute("pra train digits --run-dir runs/demo")
        yield folder


@pytest.fixture
def undrawn(monkeypatch):
    """Trainings draw no curves and write no report."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    monkeypatch.setattr(train, "write_report", lambda run: None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, folder, request):
    if page.name != "README.md":
        request.getfixturevalue("undrawn")
    if "import PRAPipeline" in page.read_text() and importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_shim")  # diffusers imports it where it is
    with here(folder):
        for language, text in blocks(page, "sh", "python"):
            if language == "python":
                exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
            else:
                for line in text.splitlines():
                    execute(line)


@pytest.mark.usefixtures("undrawn")
def test_console_commands_make_their_files(folder, capsys):
    for page, beginning, made in (
        ("sampler.md", "pra sample runs/demo --solver adams", "samples.png"),
        ("sampler.md", "pra distill runs/demo", "runs/demo-distilled"),
        ("sampler.md", "pra sample runs/demo-distilled", "samples-2.png"),
        ("own-data.md", "pra export runs/own-icons", "icons-model/README.md"),
        ("compare.md", "pra train digits --run-dir runs/averages", "runs/averages/checkpoints/step-00000004"),
        ("compare.md", "pra sample runs/averages", "samples-3.png"),
        ("compare.md", "pra average runs/averages", "runs/averages/checkpoints/step-00000004/power-0.08.safetensors"),
        ("share.md", "pra push runs/demo alice/digits --dry-run", "look/model.safetensors"),
    ):
        (line,) = [line for line in command_lines(ROOT / "docs" / page) if line.startswith(beginning)]
        assert not (folder / made).exists()
        with here(folder):
            execute(line)
        assert capsys.readouterr().out
        assert (folder / made).exists()


@contextlib.contextmanager
def here(folder):
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def execute(line):
    """Run a command, cut, in this process: a new one takes seconds to import torch."""
    for long, short in SHORTER.items():
        line = re.sub(long, short, line)
    assert not set(line) & set("|<>$&"), f"{line} needs a shell"
    found = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in shlex.split(line)]
    program, *words = itertools.chain(*found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", words)
        code = 0
        try:
            if program == "pra":
                code = cli.main(words)
            else:
                assert program == "python"
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    assert code == 0, line


def test_the_pages_have_blocks_and_the_pictures_they_show():
    assert sum(len(list(blocks(page, "sh", "python"))) for page in PAGES) >= 5
    for page in PAGES:
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).exists(), f"{page.name} shows {picture}, which is not there"
