"""The commands in the README and the docs are ones that there are: programs, scripts, options, names, make targets.

Each is parsed by what parses it, and not run (test_readme.py runs the ``sh`` blocks). Those of the other blocks that a
tiny run answers in a moment run here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tyro
from support.answer import options_of
from support.pages import PAGES, ROOT, command_lines, commands, script, spans
from torch.distributed.run import get_args_parser

from pra import cli, recipe
from pra.config import apply_settings
from pra.errors import PraError
from studies import command as laboratory
from studies.catalogue import find_study
from studies.settings import find_scale, find_setting

OTHERS = {"apt", "sudo", "mkdir", "cp", "find", "export", ".", "hf"}
"""Programs that are not ours."""


class RefusedError(Exception):
    """A command that would not run."""


# --- who parses what ----------------------------------------------------------------------------------------


def check(words: Sequence[str]) -> None:
    """One command.

    Raises:
        RefusedError: it would be refused.
    """
    program, rest = words[0], list(words[1:])
    parsers = {"pra": pra, "python": python, "torchrun": torchrun, "make": make, "pip": pip, "sbatch": sbatch}
    program = "python" if program == "python3" else program
    if program in parsers:
        parsers[program](rest)
    elif program not in OTHERS:
        raise RefusedError(f"no program {program}")


def pra(words: list[str]) -> None:
    """By the command itself, with functions that look at names and do no work."""
    stand_ins = {name: looked_at(name, command) for name, command in cli.COMMANDS.items()}
    with patch.object(cli, "COMMANDS", stand_ins):
        parsed(lambda: cli.main(words))


def looked_at(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """In place of a command: only the names that it is given are looked up."""

    @functools.wraps(command)
    def stand_in(*args: Any, **keywords: Any) -> None:
        given = inspect.signature(command).bind(*args, **keywords)
        given.apply_defaults()
        values = given.arguments
        if name in ("train", "bench train", "show"):
            called = values.get("recipe_name") or values.get("run") or values.get("name")
            if called and "/" not in called:
                apply_settings(recipe(called), values.get("settings", ()))

    return stand_in


def studies(words: list[str]) -> None:
    """``python -m studies``, with a function that looks at names and runs no study."""

    @functools.wraps(laboratory.study_command)
    def stand_in(name: str = "", *, setting: str | None = None, scale: str = "cpu", **_: Any) -> None:
        if name:
            find_study(name), find_scale(scale)
            for one in setting.split(",") if setting else ():
                find_setting(one)

    with patch.object(laboratory, "study_command", stand_in):
        parsed(lambda: laboratory.main(words))


def python(words: list[str]) -> None:
    """``-m pra``, ``-m studies``, or a script of this repository."""
    if words[:2] == ["-m", "pra"]:
        return pra(words[2:])
    if words[:2] == ["-m", "studies"]:
        return studies(words[2:])
    if words[:2] == ["-m", "venv"]:
        return None
    path = ROOT / words[0]
    if not path.is_file():
        raise RefusedError(f"no script {words[0]}")
    module, rest = script(path), words[1:]
    if hasattr(module, "parse"):
        return parsed(lambda: module.parse(rest))
    if hasattr(module, "tyro"):
        nothing = functools.wraps(module.main)(lambda *_, **__: None)
        return parsed(lambda: tyro.cli(nothing, args=rest))
    places = list(inspect.signature(module.main).parameters)
    if len(rest) != len(places) or any(word.startswith("-") for word in rest):
        raise RefusedError(f"{words[0]} takes {' '.join(places)}")
    return None


def torchrun(words: list[str]) -> None:
    """By torch's parser, which may take an option of ours for the beginning of one of its own."""
    found: list[Any] = []
    parsed(lambda: found.append(get_args_parser().parse_args(words)))
    if (found[0].module, found[0].training_script) != (True, "pra"):
        raise RefusedError("torchrun starts something else than -m pra")
    pra(found[0].training_script_args)


def make(words: list[str]) -> None:
    """The targets, by make."""
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(done.stderr)


def pip(words: list[str]) -> None:
    """The extras that are installed, and the file of constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        name, _, extras = word.rstrip("]").partition("[")
        if name in (".", project["name"]) and not set(filter(None, extras.split(","))) <= set(
            project["optional-dependencies"]
        ):
            raise RefusedError(f"no extra {extras}")
    if "-c" in words and not (ROOT / words[words.index("-c") + 1]).is_file():
        raise RefusedError("no such file of constraints")


def sbatch(words: list[str]) -> None:
    """The job's script, which passes its arguments on to ``pra train``."""
    if not any(word.endswith(".sh") and (ROOT / word).is_file() for word in words):
        raise RefusedError("no such job")


def parsed(do: Callable[[], object]) -> None:
    """What a parser says on its way out is the reason."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = do()
        except SystemExit as end:
            code = end.code
        except PraError as error:
            raise RefusedError(str(error)) from None
    if isinstance(code, int) and code:
        raise RefusedError(said.getvalue())


# --- the pages ----------------------------------------------------------------------------------------------


def refused(page: Path) -> list[str]:
    """The commands of a page's blocks that would be refused, with the reasons."""
    wrong = []
    for line in command_lines(page):
        try:
            for words in commands(line):
                check(words)
        except RefusedError as reason:
            wrong.append(f"{line}: {reason}")
    return wrong


def unknown(page: Path) -> list[str]:
    """What the text of a page names and is not there: commands, options, targets; arguments may be left out."""
    options = every_option()
    return [span for span in spans(page) if not named(span, options)]


def named(span: str, options: set[str]) -> bool:
    words = span.split()
    if words[0].startswith("--"):
        return words[0].partition("=")[0] in options
    if words[0] in ("python", "torchrun", "make", "pip") and words[1:]:
        try:
            check([word for word in words if word != "..."])
        except RefusedError:
            return False
    return words[0] != "pra" or not words[1:] or named_command(words[1:])


def named_command(words: list[str]) -> bool:
    if len(words) == 1 and any(name.startswith(f"{words[0]} ") for name in cli.COMMANDS):
        return True
    for count in (2, 1):
        command = cli.COMMANDS.get(" ".join(words[:count]))
        if command:
            known = {*options_of(command), "--help"}
            return all(word.partition("=")[0] in known for word in words[count:] if word.startswith("--"))
    return False


@functools.cache
def every_option() -> set[str]:
    """Of our commands, our scripts and torchrun."""
    commands = [*cli.COMMANDS.values(), laboratory.study_command]
    ours = {name for command in commands for name in options_of(command)}
    theirs = {text for action in get_args_parser()._actions for text in action.option_strings}
    scripts = {
        "--" + name.replace("_", "-")
        for path in (ROOT / "benchmarks").glob("*.py")
        if "tyro.cli" in path.read_text()
        for name in inspect.signature(script(path).main).parameters
    }
    return ours | theirs | scripts | {"--"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_accepted(page: Path) -> None:
    assert refused(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_text_names_is_there(page: Path) -> None:
    assert unknown(page) == []


def test_the_pages_have_commands() -> None:
    lines = [line for page in PAGES for line in command_lines(page)]
    programs = {words[0] for line in lines for words in commands(line)}
    assert len(lines) > 80
    assert {"pra", "python", "torchrun", "make", "pip", "sbatch"} <= programs


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("pra smaple RUN", "no command 'smaple'"),
        ("pra data chekc digits", "no command 'data chekc'"),
        ("pra sample RUN --sedes 3", "unrecognized options: --sedes"),
        ("pra sample RUN --steps many", "expected a whole number, not 'many'"),
        ("pra distill", "needs RUN"),
        ("pra sample RUN RUN2", "unrecognized options: RUN2"),
        ("pra train fashoin", "no recipe 'fashoin'"),
        ("pra train digits --set train.optimizer.rl=1", "no setting"),
        ("pra study noise", "run there: python -m studies noise"),
        ("python -m studies noize", "no study 'noize'"),
        ("python -m studies noise --setting fashion-63", "no setting 'fashion-63'"),
        ("python -m studies noise --jbos 2", "unrecognized options: --jbos, 2; perhaps you meant: --jobs INT"),
        ("pra show && pra sho", "no command 'sho'"),
        ("python -m pra sample RUN \\\n    --sedes 3", "unrecognized options: --sedes"),
        ("python benchmarks/nothing.py", "no script benchmarks/nothing.py"),
        ("python benchmarks/rollout.py --repeat 3", "--repeat"),
        ("python examples/held_out.py digits RUN out", "the numbers of images"),
        ("python examples/figures.py RUN", "takes run folder"),
        ("torchrun --nproc-per-node 8 -m pra sample RUN --num 9", "ambiguous option: --num"),
        ("torchrun --nproc-per-node 8 -m pra -- sample RUN --nmu 9", "unrecognized options: --nmu"),
        ("torchrun --nproc-per-node 8 pra train digits", "something else"),
        ("make everything", "everything"),
        ("pip install 'pra-pixels[everything]'", "no extra everything"),
        ("sbatch examples/slurm/nothing.sh digits", "no such job"),
        ("prah sample", "no program prah"),
    ],
)
def test_commands_that_there_are_not(line: str, reason: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```console\n$ {line}\noutput\n```\n\n- in a list\n\n  ```sh\n  pra show\n  ```\n")
    (wrong,) = refused(page)
    assert reason in wrong


@pytest.mark.parametrize(
    ("span", "there"),
    [
        ("pra sample", True),
        ("pra push RUN\nuser/model", True),
        ("pra sample --sedes 3", False),
        ("pra smaple", False),
        ("pra data", True),
        ("pra data chekc", False),
        ("--guidance", True),
        ("--solver-steps", False),
        ("--set key=value", True),
        ("pra study", False),
        ("python -m studies solver", True),
        ("python -m studies", True),
        ("python -m studies --sedes 3", False),
        ("python benchmarks/nothing.py", False),
        ("make docs", True),
        ("make doc", False),
        ("pra-pixels[everything]", True),  # no command
    ],
)
def test_names_in_the_text(span: str, there: bool, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text with `{span}` in it.\n\n```console\n$ `pra smaple`\n```\n")
    assert (unknown(page) == []) == there


# --- those that a tiny run answers ---------------------------------------------------------------------------

FEWER = {
    "--steps 2000": "--steps 2", "runs/own-icons": "runs/fashion", "runs/demo": "runs/fashion",
    "pra train digits": "pra train tiny --device cpu", "_every=100": "_every=4",
}  # fmt: skip
"""What is changed in a command, so that it takes a moment."""


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run in it."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(trained, folder / "runs" / "fashion")
    return folder


@pytest.mark.parametrize(
    ("page", "beginning", "made"),
    [
        ("performance.md", "pra sample runs/fashion --solver", "samples.png"),
        ("performance.md", "pra distill runs/fashion", "runs/fashion-distilled"),
        ("performance.md", "pra sample runs/fashion-distilled", "samples.png"),
        ("own-data.md", "pra export runs/own-icons", "icons-model/README.md"),
        ("recipes.md", "pra train digits --run-dir runs/averages", "runs/averages/checkpoints/step-00000004"),
        ("recipes.md", "pra sample runs/averages", "samples.png"),
        ("recipes.md", "pra average runs/averages", "runs/averages/checkpoints/step-00000020/power-0.08.safetensors"),
        ("share.md", "pra push runs/demo alice/digits --dry-run", "look/model.safetensors"),
    ],
)
def test_what_takes_a_moment_runs(
    page: str,
    beginning: str,
    made: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = [line for line in command_lines(ROOT / "docs" / page) if line.startswith(beginning)]
    for long, short in FEWER.items():
        line = line.replace(long, short)
    ((_, *words),) = commands(line)
    with contextlib.chdir(folder):
        assert cli.main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    assert (folder / made).exists()
    if made == "samples.png":
        (folder / made).unlink()  # where two commands write, and none overwrites
