"""Public names of ``pra`` beside its functions, and the parts that the documentation names."""

import os
import re
import tomllib
from pathlib import Path

import torch

import pra
from pra.utils.distributed import World
from pra.utils.provenance import DISTRIBUTION, package_version

ROOT = Path(__file__).parents[2]


def test_install_page_names_the_packages_and_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs" / "install.md").read_text().partition("## Packages")[2].partition("\n## ")[0]
    core = re.search(r"The core needs (.*?)\. Everything else", text)
    assert core
    named = set(re.split(", | and ", core[1]))
    assert named == {re.split("[^a-z0-9-]", package)[0] for package in project["dependencies"]}
    assert set(re.findall(r"^\| `(.*?)`", text, re.M)) == set(project["optional-dependencies"])


def test_the_version():
    assert pra.__version__ == package_version(DISTRIBUTION)
    assert {"Trained", "__version__"} <= set(pra.__all__)


def test_version_is_the_same_wherever_it_is_named():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, line in (("CITATION.cff", rf"^version: {version}$"), ("CHANGELOG.md", rf"^## {version} ")):
        assert re.search(line, (ROOT / name).read_text(), re.M), name


def test_workflow_calls_the_script_that_there_is():
    commands = re.findall(r"^ *- run: (\S+)$", (ROOT / ".github" / "workflows" / "ci.yml").read_text(), re.M)
    assert commands == [".ci/run"]
    assert os.access(ROOT / commands[0], os.X_OK)


def test_training_takes_a_device_as_an_object_too(tmp_path, monkeypatch):
    asked = []
    choose = World.device
    monkeypatch.setattr(World, "device", lambda self, name: asked.append(name) or choose(self, name))
    config = pra.config.apply_settings(pra.recipe("tiny"), ["train.steps=1", "train.sample_every=0"])
    trained = pra.train(config, tmp_path / "run", device=torch.device("cpu"), progress=False)
    assert isinstance(trained, pra.Trained)
    assert asked == ["cpu"]  # its name: of several processes each takes its own GPU where that is "cuda"


def test_tests_have_short_names_and_use_public_ones():
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    private = re.compile(r"^\s*from (?:pra|studies)\S* import .*\b_[a-z]|\bdistributed\._|\bweights\._|\bcli\._", re.M)
    long = [name for text in sources.values() for name in re.findall(r"^def (test_\w+)", text, re.M) if len(name) > 60]
    assert long == []
    assert [path.name for path, text in sources.items() if private.search(text) and path != Path(__file__)] == []
