"""The provenance of a result: versions, commit, hardware and command of this process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pra.errors import PraError
from pra.utils.files import check_regular

DISTRIBUTION = "pra-pixels"
"""The package's name on PyPI, where a stranger's package is called pra."""


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a result, as JSON values."""
    packages = ("torch", "numpy", "pillow", "safetensors")
    versions = {"pra": package_version(DISTRIBUTION)} | {name: package_version(name) for name in packages}
    return {
        "command": [*_program(sys.argv[0]), *sys.argv[1:]],
        "versions": versions | {"python": platform.python_version()},
        "commit": commit(),
        "hardware": {"device": device_name(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "platform": platform.platform(),
    }


def _program(path: str) -> list[str]:  # its installed path would give away a user's home directory
    name, package = Path(path).name, Path(path).parent.name
    if name == "__main__.py" and package != "pra":
        return ["python", "-m", package]
    return ["pra"] if name in ("pra", "__main__.py") else [path]


def device_name(device: torch.device | None = None) -> str:
    """Return the product name of a device; by default of the GPU if there is one, else of the processor."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    if cuda:
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the commit of the source tree, marked ``-dirty`` where the tree differs; None for an installed copy."""
    here = Path(__file__)
    # An installed copy may lie inside somebody else's repository: only a tracked file speaks for its commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def package_version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it. Refuse a file that cannot be read.

    A command asks several times, to check weights and to name them: a file is read again only if it has changed.
    """
    try:
        stat = check_regular(path).stat()
        return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}). Give another file"
        raise PraError(message, code="missing", path=path) from None


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, *version: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
