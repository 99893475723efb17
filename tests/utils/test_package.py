"""An installed package contains every file that it reads when it runs, and no part of the laboratory."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from pra.utils import extras

ROOT = Path(__file__).parents[2]


def done(*command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The packages of an environment into which pip has installed an sdist, by the wheel that it makes of it.

    Only the packages that pra needs come from this environment. The sdist is built from a copy: that leaves folders.
    """
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel: pip install 'setuptools>=77'")
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("src", "studies"):
        shutil.copytree(
            ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
        )
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    done(sys.executable, "-c", build, folder=project)
    venv.create(out / "venv", with_pip=False)
    [site] = (out / "venv" / "lib").glob("python3*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"))
    options = ["--quiet", "--no-compile", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    done(out / "venv" / "bin" / "python", "-m", "pip", "install", *options, *out.glob("*.tar.gz"), folder=out)
    return site


def test_package_in_an_empty_environment_samples(site, tmp_path):
    programs = site.parents[2] / "bin"
    own = f"from importlib.util import find_spec; assert find_spec('pra').origin == '{site}/pra/__init__.py'"
    done(programs / "python", "-c", own, folder=tmp_path)
    done(programs / "pra", "sample", "--labels", "3", "--seeds", "0", "--out", "three.png", folder=tmp_path)
    assert (tmp_path / "three.png").stat().st_size > 0


def test_package_holds_its_files_and_no_laboratory(site):
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.*") if "__pycache__" not in path.parts}
    wanted = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "pra").rglob("*.*")}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert {"pra/py.typed", "pra/demo/page.css", "pra/shipped/model.safetensors"} <= wanted <= names
    assert (ROOT / "studies" / "__main__.py").exists()
    assert [
        name for name in names if not name.startswith(("pra/", "pra_pixels-", "needed.pth")) or "studies" in name
    ] == []


def test_install_command_in_a_clone_is_editable(monkeypatch):
    assert extras.install_command("train") == f"pip install -e '{ROOT}[train]'"
    monkeypatch.setattr(extras, "__file__", "/venv/lib/python3/site-packages/pra/utils/extras.py")
    assert extras.install_command("train") == "pip install 'pra-pixels[train]'"


def test_package_does_not_import_the_laboratory():
    imports = re.compile(r"^\s*(from|import)\s+(pra\.)?studies\b", re.M)
    modules = sorted((ROOT / "src" / "pra").rglob("*.py"))
    assert [path.name for path in modules if imports.search(path.read_text())] == []
