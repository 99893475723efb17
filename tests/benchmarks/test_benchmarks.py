"""Scripts in ``benchmarks`` that no other test knows: ``first_image.py`` without its installation, ``fine_tune.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import fine_tune
import first_image
import pytest
from PIL import Image
from support.refusal import refused


def test_commands_are_timed_each_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write = "import sys, time; open('samples.png', 'x'); time.sleep(float(sys.argv[1]))"
    steps = [(name, [sys.executable, "-c", write, seconds]) for name, seconds in (("slow", "0.3"), ("again", "0"))]
    seconds = first_image.timed(steps, tmp_path)
    assert list(seconds) == ["slow", "again"]
    assert seconds["slow"] > max(0.3, seconds["again"])


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    steps = [
        ("pip install", [sys.executable, "-c", "import sys; sys.exit('wait\\nno such package')"]),
        ("next", ["no"]),
    ]
    refused(lambda: first_image.timed(steps, tmp_path), "pip install ended with 1: no such package")


@pytest.mark.parametrize("no_cache", [False, True])
def test_what_a_newcomer_types(tmp_path: Path, no_cache: bool) -> None:
    project = first_image.copied(tmp_path / "checkout")
    assert (project / "src" / "pra" / "shipped" / "model.safetensors").exists()
    assert not list(project.rglob("__pycache__"))
    steps = first_image.commands(project, tmp_path, no_cache)
    venv, install, sample, again = [[str(word) for word in words] for _, words in steps]
    assert venv == [sys.executable, "-m", "venv", str(tmp_path / "venv")]
    assert ("--no-cache-dir" in install) == no_cache
    assert install[-1] == str(project)
    assert Path(install[install.index("-c") + 1]).is_file()
    assert sample == again
    assert sample[-2:] == [str(tmp_path / "venv" / "bin" / "pra"), "sample"]


@pytest.mark.filterwarnings("ignore:a state dimension varies little")  # in four pictures
def test_fine_tuning_and_training_from_nothing_are_measured_alike(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        place = tmp_path / "pictures" / ("dark" if number % 4 < 2 else "bright")
        place.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((8, 8)).point(lambda grey, n=number: grey // (n + 1)).save(
            place / f"{number}.png"
        )
    source, out = f"folder:{tmp_path / 'pictures'}", tmp_path / "out"
    fine_tune.main(trained, source, out, lower=(10,), steps=(2,), scratch=(2,))
    head, before, tuned, scratch = capsys.readouterr().out.splitlines()
    assert head == "4 pictures to train on, 4 to measure on"
    told = [[term.split()[-2:] for term in line.split(", ")] for line in (before, tuned, scratch)]
    assert [[name for name, _ in terms] for terms in told] == [["pixel", "flow", "auxiliary"]] * 3
    pixel = [float(terms[0][1]) for terms in told]
    assert [line.split()[0] for line in (before, tuned, scratch)] == ["before", "rate", "scratch"]
    assert abs(pixel[0] - pixel[1]) < abs(pixel[0] - pixel[2])  # two steps change a trained codec but little
    assert (out / "rate-10-2" / "config.json").exists()
    assert not (out / "rate-10-2" / "samples").exists()
