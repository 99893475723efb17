"""The command line itself: help, the line of an error, exit codes, interruptions."""

import io
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

from pra import cli
from pra.commands import show
from pra.errors import PraError, nearest


def test_help_lists_options_choices_and_usage(call):
    for command in cli.COMMANDS:
        code, text, errors = call(*command.split(), "--help")
        assert (code, errors) == (0, [])
        assert text.startswith(f"usage: pra {command} [-h]")
        assert [noise for noise in ("None", "--no-", "default: False") if noise in text] == []
    text = " ".join(call("sample", "--help").out.replace("│", " ").split())
    for part in ("--solver euler|midpoint|heun|euler-maruyama", "--steps INT", "(default: ema)", "2-2 is class"):
        assert part in text
    for command, usage in (("show", "[RECIPE|RUN]"), ("demo", "[RUN] [RUN2]"), ("push", "RUN USER/MODEL")):
        assert f" {usage}" in call(command, "--help").out.splitlines()[0]


def test_help_of_pra_and_of_groups_lists_commands(call):
    code, text, _ = call("--help")
    assert code == 0
    assert all(command in text for command in cli.COMMANDS)
    assert "Train a recipe, or resume a run." in text
    for group, own in (("data", "check,pack"), ("bench", "sample,train,pareto")):
        code, text, errors = call(group, "-h")
        assert (code, errors) == (0, [])
        assert text.splitlines()[0] == f"usage: pra {group} [-h] {{{own}}}"
        assert "distill" not in text


@pytest.mark.parametrize("command", ["sample", "eval", "report", "show", "sweep", "train tiny --run-dir", "compare ."])
def test_name_that_is_too_long_is_one_line(call, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*command.split(), "a" * 300).is_refusal("a" * 50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "1"])
def test_help_on_a_terminal_obeys_no_color(value, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr("sys.stdout", terminal)
    assert cli.main(["show", "--help"]) == 0
    assert ("\x1b" in terminal.getvalue()) == (not value)


def test_version_is_printed(call, monkeypatch):
    for version, said in (("1.2.3", "1.2.3"), (None, "(not installed)")):
        monkeypatch.setattr(cli, "package_version", lambda name, version=version: version)
        assert call("--version") == (0, f"pra {said}\n", [])


def test_wrong_words_are_one_line(call):
    for line, parts in (
        ("", ["Known: train, distill,", "see `pra --help`"]),
        ("trian tiny", ["'trian'", "did you mean 'train'?"]),
        ("xyzzy", [f"'xyzzy'. Known: {', '.join(sorted(cli.COMMANDS))}"]),
        ("data", ["Known: check, pack", "see `pra data --help`"]),
        ("data chekc digits", ["'data chekc'", "did you mean 'check'?"]),
        ("train tiny --stesp 3", ["pra train", "--stesp", "perhaps you meant: --steps INT; see `pra train --help`"]),
        ("sample run --label 3", ["--label,", "--labels TEXT"]),
        ("sample run -n 3", ["pra sample", "-n"]),
        ("show tiny --no-json", ["--no-json", "--json"]),
        ("complete", ["pra complete needs RUN --rows INT; see `pra complete --help`"]),
        ("train tiny --steps many", ["pra train", "--steps: expected a whole number, not 'many'"]),
        ("sample run --guidance x", ["pra sample", "--guidance: expected a number, not 'x'"]),
        ("train tiny --steps", ["pra train", "missing value", "--steps"]),
    ):
        assert call(*line.split()).is_refusal(*parts)


def test_error_without_utf8_is_the_same_line(call, monkeypatch):
    line = call("complete", "--rwos", "3").errors
    monkeypatch.setattr(type(sys.stdout), "encoding", "ascii")
    assert call("complete", "--rwos", "3").errors == line


def test_two_ranks_report_an_error_once(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        for words in (["trian", "tiny"], ["train", "--stesp", "3"]):
            answer = call(*words)
            assert (answer.code, len(answer.errors)) == (2, lines)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert call("trian", "tiny").is_refusal("train")


def test_verbose_turns_the_loggers_on(call):
    for words, level in ((("show", "-v"), logging.INFO), (("show",), logging.WARNING)):
        assert call(*words).code == 0
        assert logging.getLogger("pra").level == level


def test_errors_in_the_work_are_one_line_each(call, monkeypatch):
    def fail(name):
        raise errors[name]

    errors = {"stop": KeyboardInterrupt(), "broken": BrokenPipeError()}
    errors |= {"closed": PermissionError(13, "Permission denied", "closed/config.json")}
    monkeypatch.setattr(show, "recipe_or_run", fail)
    assert call("show", "stop") == (130, "", ["pra: interrupted"])
    assert call("show", "closed").is_refusal("closed/config.json cannot be accessed (Permission denied)")
    with pytest.raises(BrokenPipeError):  # not of stdout: it is not hidden
        call("show", "broken")


@pytest.mark.parametrize("line", ["show", "show --help", "--help", "--version"])
def test_output_without_reader_ends_silently(line, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(line.split()) == 141
        output.flush()  # as Python does at its end
    assert capfd.readouterr().err == ""


def test_names_beyond_the_output_s_encoding_are_escaped(monkeypatch, capfd):
    monkeypatch.setattr(cli, "parse", lambda _: lambda: print("caf\udce9 猫"))
    with io.TextIOWrapper(io.BytesIO(), "ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main([]) == 0
        assert output.buffer.getvalue() == b"caf\\udce9 \\u732b\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
def test_full_disk_under_the_output_is_one_line(monkeypatch, capfd):
    with open("/dev/full", "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(["--version"]) == 2
        output.flush()  # as Python does at its end
    assert capfd.readouterr().err.splitlines() == [
        "pra: error: stdout cannot be written (No space left on device). Redirect it"
    ]
    monkeypatch.setattr(sys, "stdout", None)  # as with >&-
    assert cli.main(["--version"]) == 0


def test_a_strangers_text_is_escaped_and_short(call, monkeypatch):
    def refuse(name):
        warnings.warn("class \x1b[2J\0\u2028b\nc", stacklevel=1)
        raise PraError(f"class \x1b]0;\udcff {'long' * 10**6}")

    monkeypatch.setattr(show, "recipe_or_run", refuse)
    code, _, (warning, error) = call("show", "stop")
    assert code == 2
    assert warning == r"pra: warning: class \x1b[2J\x00 b c"
    assert error.startswith(r"pra: error: class \x1b]0;\udcff long")
    assert len(error) < 2_100
    assert nearest("x", map(str, range(10_000))).endswith("1041, ... (10,000 in all)")
