"""A wheel holds all that the package reads when it runs, and nothing of the laboratory."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READ = (
    "py.typed",
    "sampling/native/*.cpp",
    "sampling/native/*.h",
    "evaluation/report/*.html",
    "demo/*.html",
    "demo/*.css",
)
"""Files beside the modules, below the package."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel, built of a copy: building leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel: pip install 'setuptools>=77'")
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (project / "studies").mkdir()
    for module in (ROOT / "studies").glob("*.py"):
        shutil.copy(module, project / "studies")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.glob("pra-*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def in_the_checkout(pattern: str) -> set[str]:
    return {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "pra").glob(pattern)}


@pytest.mark.parametrize("pattern", READ)
def test_files_beside_the_modules_are_in_the_wheel(wheel: set[str], pattern: str) -> None:
    wanted = in_the_checkout(pattern)
    assert wanted
    assert wanted <= wheel


def test_every_module_and_the_command_are_in_the_wheel(wheel: set[str]) -> None:
    assert in_the_checkout("**/*.py") <= wheel
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def test_laboratory_is_not_in_the_wheel(wheel: set[str]) -> None:
    assert (ROOT / "studies" / "__main__.py").exists()
    assert [name for name in wheel if not name.startswith(("pra/", "pra-")) or "studies" in name] == []


def test_package_does_not_import_the_laboratory() -> None:
    imports = re.compile(r"^\s*(from|import)\s+(pra\.)?studies\b", re.M)
    modules = sorted((ROOT / "src" / "pra").rglob("*.py"))
    assert [path.name for path in modules if imports.search(path.read_text())] == []


def test_the_model_that_comes_with_pra_is_in_the_wheel(wheel: set[str]) -> None:
    shipped = in_the_checkout("shipped/*")
    assert {"pra/shipped/config.json", "pra/shipped/model.safetensors"} <= shipped <= wheel
