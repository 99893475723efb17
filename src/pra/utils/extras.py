"""What to say where the packages of an extra cannot be imported."""

from __future__ import annotations

from pathlib import Path

import torch

from pra.errors import reason_of
from pra.utils.provenance import DISTRIBUTION, package_version


def install_command(extra: str) -> str:
    """Return the command that installs an extra: into this clone, or from PyPI where the package is installed."""
    clone = Path(__file__).parents[3]
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{clone}[{extra}]'"
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def import_failed(what: str, packages: str, extra: str, error: Exception) -> str:
    """Why an import failed and what is to be installed, for a :class:`pra.errors.PraError`.

    A torchvision that was built for another torch is installed, and yet raises when it is imported, an ``OSError`` or a
    ``RuntimeError`` as a rule: installing the extra would change nothing.

    Args:
        what: needs the packages.
        packages: as a person would list them.
        extra: of pra, that brings them.
        error: what the import raised.
    """
    reason = reason_of(error)
    found = package_version("torchvision")
    if isinstance(error, ModuleNotFoundError) or found is None:
        return f"{what} needs {packages} ({reason}); {install_command(extra)}"
    return (
        f"{what} needs a torchvision built for this torch: torchvision {found} does not fit torch {torch.__version__} "
        f"({reason}); pip install --force-reinstall --no-deps '{_fitting(torch.__version__)}', from the index that "
        "torch came from"
    )


def _fitting(version: str) -> str:
    """The requirement of the torchvision that is released with a torch: 0.21 with 2.6, and so on one by one."""
    major, minor, *_ = version.split(".")
    return f"torchvision==0.{int(minor) + 15}.*" if major == "2" else "torchvision"
