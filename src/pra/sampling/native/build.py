"""Compiles ``step.cpp`` and its headers for this processor, once, and loads them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from pra.errors import PraError
from pra.utils.files import cache_folder, write_atomically

SOURCE = Path(__file__).with_name("step.cpp")
SWITCH = "PRA_NATIVE"
"""Environment variable; 0 leaves everything to torch."""

# Reorder nothing: infinities, NaNs and the order of sums stay as written.
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)

# Choose by torch's CPU capability, not by -march=native: unlike machines may share a home directory.
_PROCESSORS = {
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
    "AVX2": ("-mavx2", "-mfma"),
}

_TIMEOUT = 120.0


def library() -> ctypes.CDLL | None:
    """Return the compiled arithmetic; None if it is switched off, or if there is no working compiler.

    The first call on a machine compiles it, in two or three seconds, into ``$XDG_CACHE_HOME/pra/native``.
    """
    return None if os.environ.get(SWITCH) == "0" else built()


@functools.cache
def built() -> ctypes.CDLL | None:
    """Return the compiled arithmetic. Compile it if it is not in the cache."""
    compiler = find_compiler()
    if compiler is None:
        return None
    flags = (*FLAGS, *_PROCESSORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    try:
        texts = [path.read_text(encoding="utf-8") for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
        asked = [compiler, platform.machine(), *platform.libc_ver(), *flags, *texts]
        name = f"step-{hashlib.sha256(chr(0).join(asked).encode()).hexdigest()[:16]}.so"
        kept = cache_folder() / "native" / name
        if kept.exists():
            with contextlib.suppress(OSError):  # damaged: compile again
                return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(prefix="pra-") as folder:
            path = Path(folder) / name
            command = [compiler, *flags, str(SOURCE), "-o", str(path)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
            with contextlib.suppress(PraError, OSError):  # the cache may be read-only, or mounted noexec
                write_atomically(kept, lambda file: file.write(path.read_bytes()))
                return ctypes.CDLL(str(kept))
            return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
        warnings.warn(
            f"the fast sampler cannot be compiled with {compiler} ({reason[:200]}): images take a few times as long. "
            f"Set CXX to another compiler, or {SWITCH}=0 to do without",
            stacklevel=2,
        )
        return None


def find_compiler() -> str | None:
    """Return the path of a C++ compiler, if any."""
    if os.name != "posix":
        return None
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    # On a Mac without developer tools, a compiler in /usr/bin only asks the user to install them.
    if found and sys.platform == "darwin" and found.startswith("/usr/bin/"):
        tools = subprocess.run(["xcode-select", "-p"], capture_output=True, check=False)
        return found if tools.returncode == 0 else None
    return found
