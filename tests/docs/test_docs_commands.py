"""The commands in the README and the docs are parsed by their own parsers. test_readme.py runs some of them."""

import contextlib
import functools
import inspect
import io
import subprocess
import sys
import tomllib

import pytest
import tyro
from support.answer import options_of
from support.pages import PAGES, ROOT, command_lines, commands, script, spans
from torch.distributed.run import get_args_parser

from pra import cli, recipe
from pra.commands.program import VERBOSE, parse_command
from pra.config import apply_settings
from pra.errors import PraError
from studies import command as laboratory
from studies.catalogue import find_study
from studies.settings import find_scale, find_setting

OTHERS = {"sbatch", "apt", "sudo", "mkdir", "cp", "find", "export", ".", "hf", "npm"}
"""Programs that are not ours."""


def check(words):
    """Parse one command as its program does. Return the reason for a refusal, or an empty text."""
    program, rest = words[0].replace("python3", "python"), list(words[1:])
    parsers = {"pra": pra, "python": python, "torchrun": torchrun, "make": make, "pip": pip}
    files = [word for word in rest if word.endswith((".py", ".sh", ".txt"))]
    if missing := [file for file in files if not (ROOT / file).is_file()]:
        return f"no file {missing[0]}"
    if program == "sbatch" and not files:
        return "no job"
    if program not in parsers:
        return "" if program in OTHERS else f"no program {program}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            parsers[program](rest)
    except PraError as error:
        return str(error)
    except SystemExit as end:
        return said.getvalue() or str(end.code) if end.code else ""
    return ""


def named_values(work):
    given = inspect.signature(work.func).bind(*work.args, **work.keywords)
    given.apply_defaults()
    return given.arguments


def pra(words):
    """Parse by the command line itself, as far as the work; recipes and settings are looked up."""
    work = cli.parse([word for word in words if word not in VERBOSE])
    values = named_values(work) if work.func in cli.COMMANDS.values() else {}
    called = values.get("recipe_name") or values.get("name")
    if called and "/" not in called:
        apply_settings(recipe(called), values.get("settings", ()))


def python(words):
    """``-m pra``, ``-m studies``, or a script of this repository."""
    if words[:2] == ["-m", "pra"]:
        return pra(words[2:])
    if words[:2] == ["-m", "studies"]:
        values = named_values(parse_command("python -m studies", laboratory.study_command, words[2:]))
        if values["name"]:
            find_study(values["name"]), find_scale(values["scale"])
        return [find_setting(one) for one in (values["setting"] or "").split(",") if one] and None
    if words[:2] == ["-m", "venv"]:
        return None
    if words[:2] == ["-m", "pytest"]:
        sys.exit(" ".join(word for word in words if "/" in word and not (ROOT / word).exists()))
    module, rest = script(ROOT / words[0]), words[1:]
    if hasattr(module, "parse"):
        return module.parse(rest) and None
    if hasattr(module, "tyro"):
        return tyro.cli(functools.wraps(module.main)(lambda *_, **__: None), args=rest)
    places = list(inspect.signature(module.main).parameters)
    if len(rest) != len(places) or any(word.startswith("-") for word in rest):
        sys.exit(f"{words[0]} takes {' '.join(places)}")
    return None


def torchrun(words):
    """Parse by torch's parser, which may read our option as an abbreviation of its own."""
    found = get_args_parser().parse_args(words)
    if (found.module, found.training_script) != (True, "pra"):
        sys.exit("torchrun starts something else than -m pra")
    pra(found.training_script_args)


def make(words):
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    sys.exit(done.returncode and done.stderr)


def pip(words):
    """The extras that are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        name, _, extras = word.rstrip("]").partition("[")
        unknown = set(filter(None, extras.split(","))) - set(project["optional-dependencies"])
        if name in (".", project["name"]) and unknown:
            sys.exit(f"no extra {unknown}")


def refused(page):
    """The commands of a page's blocks that would be refused, with the reasons."""
    reasons = ((line, check(words)) for line in command_lines(page) for words in commands(line))
    return [f"{line}: {reason}" for line, reason in reasons if reason]


def unknown(page):
    """Return names in a page's text that do not exist: commands, options, targets; arguments may be left out."""
    options = every_option()
    return [span for span in spans(page) if not named(span, options)]


def named(span, options):
    words = span.split()
    if words[0].startswith("--"):
        return words[0].partition("=")[0] in options
    if words[0] in ("python", "torchrun", "make", "pip") and words[1:]:
        return not check([word for word in words if word != "..."])
    return words[0] != "pra" or not words[1:] or named_command(words[1:])


def named_command(words):
    if len(words) == 1 and any(name.startswith(f"{words[0]} ") for name in cli.COMMANDS):
        return True
    for count in (2, 1):
        command = cli.COMMANDS.get(" ".join(words[:count]))
        if command:
            known = {*options_of(command), "--help"}
            return all(word.partition("=")[0] in known for word in words[count:] if word.startswith("--"))
    return False


@functools.cache
def every_option():
    """Options of our commands, our scripts and torchrun."""
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
def test_what_a_page_names_is_there(page):
    assert refused(page) == []
    assert unknown(page) == []


def test_the_pages_have_commands():
    lines = [line for page in PAGES for line in command_lines(page)]
    programs = {words[0] for line in lines for words in commands(line)}
    assert len(lines) > 80
    assert {"pra", "python", "torchrun", "make", "pip", "sbatch"} <= programs


def test_commands_that_there_are_not_are_refused(tmp_path):
    page = tmp_path / "page.md"
    for line, reason in (
        ("pra smaple RUN", "no command 'smaple'"),
        ("pra sample RUN --sedes 3", "unrecognized options: --sedes"),
        ("pra distill", "needs RUN"),
        ("pra train fashoin", "no recipe 'fashoin'"),
        ("pra train digits --set train.optimizer.rl=1", "no setting"),
        ("python -m studies noize", "no study 'noize'"),
        ("python -m studies noise --setting fashion-63", "no setting 'fashion-63'"),
        ("pra show && pra sho", "no command 'sho'"),
        ("python -m pra sample RUN \\\n    --sedes 3", "unrecognized options: --sedes"),
        ("python benchmarks/nothing.py", "no file benchmarks/nothing.py"),
        ("python benchmarks/rollout.py --repeat 3", "--repeat"),
        ("python examples/held_out.py digits RUN out", "the numbers of images"),
        ("python examples/figures.py RUN", "takes run folder"),
        ("torchrun --nproc-per-node 8 -m pra sample RUN --num 9", "ambiguous option: --num"),
        ("torchrun --nproc-per-node 8 -m pra -- sample RUN --nmu 9", "unrecognized options: --nmu"),
        ("torchrun --nproc-per-node 8 pra train digits", "something else"),
        ("make everything", "everything"),
        ("pip install 'pra-pixels[everything]'", "no extra {'everything'}"),
        ("pip install . -c constraint.txt", "no file constraint.txt"),
        ("sbatch --nodes 2 digits", "no job"),
        ("sbatch examples/slurm/nothing.sh digits", "no file examples/slurm/nothing.sh"),
        ("prah sample", "no program prah"),
    ):
        page.write_text(f"Text.\n\n```console\n$ {line}\noutput\n```\n\n- in a list\n\n  ```sh\n  pra show\n  ```\n")
        (wrong,) = refused(page)
        assert reason in wrong


def test_names_in_the_text_are_looked_up(tmp_path):
    page = tmp_path / "page.md"
    there = (
        "pra sample", "pra push RUN\nuser/model", "pra data", "--guidance", "--set key=value",
        "python -m studies solver", "python -m studies", "make docs", "pra-pixels[everything]",
    )  # fmt: skip
    missing = (
        "pra sample --sedes 3", "pra smaple", "pra data chekc", "--solver-steps", "pra study",
        "python -m studies --sedes 3", "python benchmarks/nothing.py", "make doc",
    )  # fmt: skip
    page.write_text("Text with `" + "` and `".join(there + missing) + "` in it.\n\n```console\n$ `pra smaple`\n```\n")
    assert unknown(page) == list(missing)
