"""Places on the disk that a person names, and where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str) -> Path:
    """``~`` as the home directory. An unknown user's stays as it is, for a message to name."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/pra``, in ``~/.cache`` where that is not set."""
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pra"
