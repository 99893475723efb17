"""The pages of the documentation, their blocks, and the scripts that they name."""

import importlib.util
import itertools
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
SHELL = ("sh", "bash", "console")

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)


def blocks(page, *languages):
    """Language and text of the fenced blocks in these languages."""
    for _, language, text in FENCE.findall(page.read_text()):
        if language in languages:
            yield language, text


def command_lines(page):
    """The commands of the shell's blocks, continued lines joined; in ``console``, which has output too, after ``$``."""
    for language, text in blocks(page, *SHELL):
        for line in text.replace("\\\n", " ").splitlines():
            if language != "console":
                yield line
            elif line.lstrip().startswith("$ "):
                yield line.lstrip()[2:]


def spans(page):
    """Return the texts between backticks outside of blocks, each on one line."""
    for _, text in re.findall(r"(`+)(.+?)\1", FENCE.sub("", page.read_text()), re.S):
        yield " ".join(text.split())


def commands(line):
    """The words of each command on a line, which ``&&`` joins; without comments."""
    for joins, words in itertools.groupby(shlex.split(line, comments=True), "&&".__eq__):
        if not joins:
            yield list(words)


def script(path):
    """A script as a module, as ``import`` would have it; its main program does not run."""
    known = sys.modules.get(path.stem)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
