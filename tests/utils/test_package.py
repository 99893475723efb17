"""A wheel holds all that the package reads when it runs, and nothing of the laboratory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from pra.utils.extras import install_command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist, built from a copy: building leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel: pip install 'setuptools>=77'")
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (project / "studies").mkdir()
    for module in (ROOT / "studies").glob("*.py"):
        shutil.copy(module, project / "studies")
    for kind in ("wheel", "sdist"):
        build = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", build], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return {path.suffix: path for path in out.iterdir()}


@pytest.mark.parametrize("kind", [".whl", ".gz"])
def test_package_installed_in_an_empty_environment_samples(kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    """Only the packages that pra needs come from this environment; pra itself is what was built."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"))
    python = tmp_path / "venv" / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    for command in (
        [python, "-m", "pip", "install", *options, built[kind]],
        [tmp_path / "venv" / "bin" / "pra", "sample", "--labels", "3", "--seeds", "0", "--out", "three.png"],
    ):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "three.png").stat().st_size > 0
    code = "import pra; from pra.utils.extras import install_command; print(pra.__file__, install_command('train'))"
    told = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert told == f"{site / 'pra' / '__init__.py'} pip install 'pra-pixels[train]'\n"


def test_install_command_in_a_clone_is_editable() -> None:
    assert install_command("train") == f"pip install -e '{ROOT}[train]'"


def test_wheel_holds_the_package_and_no_laboratory(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as archive:
        names = set(archive.namelist())
    wanted = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "pra").rglob("*.*")}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert {"pra/py.typed", "pra/demo/page.css", "pra/shipped/model.safetensors"} <= wanted <= names
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
    assert (ROOT / "studies" / "__main__.py").exists()
    assert [name for name in names if not name.startswith(("pra/", "pra_pixels-")) or "studies" in name] == []


def test_package_does_not_import_the_laboratory() -> None:
    imports = re.compile(r"^\s*(from|import)\s+(pra\.)?studies\b", re.M)
    modules = sorted((ROOT / "src" / "pra").rglob("*.py"))
    assert [path.name for path in modules if imports.search(path.read_text())] == []
