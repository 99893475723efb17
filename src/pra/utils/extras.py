"""Messages for packages that cannot be imported."""

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
    """Say why ``what`` could not import the ``packages`` of an extra, and what to install.

    A torchvision built for another torch is installed and yet raises, mostly an ``OSError`` or a ``RuntimeError``.
    """
    reason = reason_of(error)
    found = package_version("torchvision")
    if isinstance(error, ModuleNotFoundError) or found is None:
        return f"{what} needs {packages} ({reason}); {install_command(extra)}"
    major, minor, *_ = torch.__version__.split(".")
    fitting = f"torchvision==0.{int(minor) + 15}.*" if major == "2" else "torchvision"  # 0.21 with 2.6, and so on
    return (
        f"{what} needs a torchvision built for this torch: torchvision {found} does not fit torch {torch.__version__} "
        f"({reason}); pip install --force-reinstall --no-deps '{fitting}', from the index that torch came from"
    )
