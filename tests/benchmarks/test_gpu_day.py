"""``benchmarks/gpu_day.py``: the parts, their limits, and what is kept when one fails."""

import functools
import inspect
import json
import shlex
import shutil
import sys
from pathlib import Path

import gpu_day
import pytest
import torch
import tyro
from support.pages import ROOT, script
from support.refusal import refused

import pra
from pra import cli
from pra.commands.program import parse_command
from pra.config import apply_settings
from studies import SCALES
from studies.command import study_command


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder for the work and the results of a day."""
    monkeypatch.setattr(gpu_day, "WORK", tmp_path / "work")
    return tmp_path / "day.json"


def only(monkeypatch, *parts):
    monkeypatch.setattr(gpu_day, "parts", lambda rehearsal: iter(parts))


def part(name, code, limit=60.0, **more):
    return gpu_day.Part(name, f'python -c "{code}"', limit, gpu_day.read_last_line, **more)


GOOD = "print(chr(123) + chr(34) + 'results' + chr(34) + ': [1]' + chr(125))"


def test_gpu_day_measures_a_part_of_the_rehearsal(place, capsys):
    gpu_day.main(rehearsal=True, only=("sample S",), out=place)
    found = json.loads(place.read_text())
    assert found["rehearsal"] is True
    assert set(found["where"]) >= {"commit", "hardware", "versions", "date"}
    assert list(found["parts"]) == ["sample S"]
    assert found["parts"]["sample S"]["status"] == "done"
    assert "| sample S | 4 |" in capsys.readouterr().out
    assert "$ python -m pra bench sample tiny" in place.with_suffix(".log").read_text()


def test_gpu_day_rehearsal_has_the_parts_of_the_day():
    real, rehearsed = list(gpu_day.parts(False)), list(gpu_day.parts(True))
    assert [(each.name, each.limit, each.read) for each in real] == [
        (each.name, each.limit, each.read) for each in rehearsed
    ]
    assert all("pra-l-256" in each.command for each in real if " L" in each.name)
    assert all("tiny" in each.command for each in rehearsed if each.name[-1] in "SBL")
    assert not any("cuda" in each.command for each in rehearsed)


@pytest.mark.parametrize("part", list(gpu_day.parts(False)), ids=lambda part: part.name)
def test_gpu_day_command_is_understood(part):
    """Parse each command as far as the work: a lent GPU is not to be spent on a typo."""
    program, *words = shlex.split(part.command)[1:]
    if program == "-m" and words[0] == "pra":
        given = cli.parse(words[1:])
        values = inspect.signature(given.func).bind(*given.args, **given.keywords).arguments
        config = pra.recipe(values["run"])
        apply_settings(config if "train" in words else config.sampling, values["settings"])
    elif program == "-m" and words[0] == "studies":
        given = parse_command("studies", study_command, words[1:])
        assert given.keywords["scale"] in SCALES
    elif program != "-m":
        tyro.cli(functools.wraps(script(ROOT / program).main)(lambda *_, **__: None), args=words)
    else:
        assert words[0] == "pytest"
        assert (ROOT / words[-1]).is_dir()


def test_gpu_day_goes_on_when_a_part_fails_or_hangs(place, monkeypatch):
    only(
        monkeypatch,
        part("broken", "import sys; print('why'); sys.exit(3)"),
        part("endless", "import time; print('begun', flush=True); time.sleep(60)", limit=2.0),
        part("broken figures", "print(1)"),
        part("missing", GOOD, needs=("no_such_package",)),
        part("good", GOOD),
    )
    gpu_day.main(rehearsal=True, out=place)
    parts = json.loads(place.read_text())["parts"]
    assert {name: each["status"] for name, each in parts.items()} == {
        "broken": "failed with 3: JSONDecodeError",
        "endless": "took too long",
        "broken figures": "failed with 0: TypeError",
        "missing": "not installed: no_such_package",
        "good": "done",
    }
    assert parts["good"]["figures"] == {"results": [1]}
    assert parts["endless"]["seconds"] < 30
    log = place.with_suffix(".log").read_text()
    assert all(text in log for text in ("why", "begun", "== good: done"))


def test_gpu_day_does_what_is_left_in_the_next_call(place, monkeypatch):
    only(monkeypatch, part("first", GOOD), part("second", GOOD))
    monkeypatch.setattr(gpu_day, "SHORTEST", 50.0)
    gpu_day.main(rehearsal=True, minutes=0.2, out=place)
    assert {each["status"] for each in json.loads(place.read_text())["parts"].values()} == {"no time left"}
    gpu_day.main(rehearsal=True, only=("first",), out=place)
    only(monkeypatch, part("first", "import sys; sys.exit(1)"), part("second", GOOD))
    gpu_day.main(rehearsal=True, out=place)
    assert {each["status"] for each in json.loads(place.read_text())["parts"].values()} == {"done"}
    gpu_day.main(rehearsal=True, out=place, again=True)
    failed = json.loads(place.read_text())["parts"]["first"]
    assert failed["status"].startswith("failed")
    gpu_day.main(rehearsal=True, out=place)
    assert json.loads(place.read_text())["parts"]["first"] == failed  # tried once


def test_gpu_day_output_names_no_folder_of_the_machine(tmp_path):
    code, text = gpu_day.run(f"python -c \"print('{gpu_day.ROOT}/src', '{sys.prefix}/lib')\"", tmp_path / "log", 60)
    assert (code, text) == (0, "src lib\n")


def test_gpu_day_without_a_gpu_is_refused(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: gpu_day.main(out=place), "no CUDA GPU", "make gpu-rehearsal", code="unsupported")
    refused(lambda: gpu_day.main(rehearsal=True, only=("samples",), out=place), "is unknown", code="unknown")
    assert not place.exists()


def test_gpu_day_page_shows_what_was_measured(tmp_path):
    page = Path(shutil.copy(gpu_day.PAGE, tmp_path))
    measured = gpu_day.RESULTS / "gpu-day.json"
    day = json.loads(measured.read_text()) if measured.exists() else None
    gpu_day.write_table(page, day)
    assert page.read_text() == gpu_day.PAGE.read_text()


def test_gpu_day_table_has_every_part_of_the_rehearsal(tmp_path):
    day = json.loads((gpu_day.RESULTS / "gpu-day-rehearsal.json").read_text())
    assert [part.name for part in gpu_day.parts(True)] == list(day["parts"])
    assert {part["status"] for part in day["parts"].values()} == {"done"}
    text = gpu_day.table(day)
    for words in (
        "| train S, compiled, float32 |",
        "| sample L |",
        "| plain path |",
        "| pra |",
        "| flow model |",
        "GPU tests: ",
    ):
        assert words in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_day.BEGIN}\nold\n{gpu_day.END}\nafter\n")
    gpu_day.write_table(page, day)
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith(f"\n{gpu_day.END}\nafter\n")
    assert "old" not in page.read_text()


def test_gpu_day_page_is_written_from_a_json(place, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"{gpu_day.BEGIN}\n{gpu_day.END}\n")
    monkeypatch.setattr(gpu_day, "PAGE", page)
    shutil.copy(gpu_day.RESULTS / "gpu-day-rehearsal.json", place)
    gpu_day.main(page=True, out=place)
    assert "| train S, compiled, float32 |" in page.read_text()
