"""Scripts in ``benchmarks`` that no other test knows: ``first_image.py``, ``fine_tune.py``, ``loaders.py``."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import fine_tune
import first_image
import loaders
import pytest
from support.refusal import refused
from support.training import pictures


def test_commands_are_timed_each_in_a_folder_of_its_own(tmp_path):
    write = "import sys, time; open('samples.png', 'x'); time.sleep(float(sys.argv[1]))"
    steps = [(name, [sys.executable, "-c", write, seconds]) for name, seconds in (("slow", "0.3"), ("again", "0"))]
    seconds = first_image.timed(steps, tmp_path)
    assert list(seconds) == ["slow", "again"]
    assert seconds["slow"] > max(0.3, seconds["again"])
    exits = "import sys; sys.exit('wait\\nno such package')"
    fails = [("pip install", [sys.executable, "-c", exits]), ("next", ["no"])]
    (tmp_path / "fails").mkdir()
    refused(lambda: first_image.timed(fails, tmp_path / "fails"), "pip install ended with 1: no such package")


def test_commands_are_those_that_a_newcomer_types(tmp_path):
    project = first_image.copied(tmp_path / "checkout")
    assert (project / "src" / "pra" / "shipped" / "model.safetensors").exists()
    assert not list(project.rglob("__pycache__"))
    for no_cache in (False, True):
        steps = first_image.commands(project, tmp_path, no_cache)
        venv, install, sample, again = [[str(word) for word in words] for _, words in steps]
        assert venv == [sys.executable, "-m", "venv", str(tmp_path / "venv")]
        assert ("--no-cache-dir" in install) == no_cache
        assert install[-1] == str(project)
        assert Path(install[install.index("-c") + 1]).is_file()
        assert sample == again
        assert sample[-2:] == [str(tmp_path / "venv" / "bin" / "pra"), "sample"]


@pytest.mark.filterwarnings("ignore:a state dimension varies little")  # in four pictures
def test_fine_tuning_is_measured_as_training_from_scratch(trained, tmp_path, capsys):
    out = tmp_path / "out"
    fine_tune.main(trained, pictures(tmp_path / "pictures", "aabbaabb"), out, lower=(10,), steps=(2,), scratch=(2,))
    head, before, tuned, scratch = capsys.readouterr().out.splitlines()
    assert head == "4 pictures to train on, 4 to measure on"
    told = [[term.split()[-2:] for term in line.split(", ")] for line in (before, tuned, scratch)]
    assert [[name for name, _ in terms] for terms in told] == [["pixel", "flow", "auxiliary"]] * 3
    pixel = [float(terms[0][1]) for terms in told]
    assert [line.split()[0] for line in (before, tuned, scratch)] == ["before", "rate", "scratch"]
    assert abs(pixel[0] - pixel[1]) < abs(pixel[0] - pixel[2])  # two steps change a trained codec but little
    assert (out / "rate-10-2" / "config.json").exists()
    assert not (out / "rate-10-2" / "samples").exists()


def test_loaders_measure_every_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaders.main(images=8, images_per_second=(500.0, 4000.0), repeats=1, out=tmp_path / "rates.json")
    figures = json.loads((tmp_path / "rates.json").read_text())
    expected = ["folder", "imagenet-tar", "wds", "wds, packed with --size 256"]
    if importlib.util.find_spec("datasets"):
        expected += ["hf", "hf, streaming"]
    assert list(figures["sources"]) == expected
    assert 90 < figures["kilobytes"] < 130  # as ImageNet's
    assert figures["hardware"]["threads"] == 1
    lines = {line[:28].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    for name, found in figures["sources"].items():
        rate = found["medians"]["recipe"]
        assert found["images_per_core_second"]["recipe"] == [rate]
        assert found["cores_for_images_per_second"] == {"500": math.ceil(500 / rate), "4000": math.ceil(4000 / rate)}
        assert lines[name][-2:] == [str(count) for count in found["cores_for_images_per_second"].values()]
