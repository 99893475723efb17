"""Reading ``.npz`` files, which others may have written and disks broken."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pra.errors import PraError, reason_of


@contextmanager
def explained(path: Path, problem: str, way_out: str) -> Iterator[None]:
    """What is read inside may be broken: whatever that raises becomes one line.

    Raises:
        PraError: ``"PATH PROBLEM (reason); WAY OUT"``; one that is raised inside passes as it is.
    """
    try:
        yield
    except PraError:
        raise
    except Exception as error:  # on broken bytes zipfile, zlib and numpy raise whatever they stumble over
        raise PraError(f"{path} {problem} ({reason_of(error)}); {way_out}") from None


def read_arrays(path: Path, wanted: Collection[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays ``wanted`` of a file; of all else in it only the name, with an empty array.

    Raises:
        Exception: whatever broken bytes raise; to be called under :func:`explained`.
    """
    with np.load(path, allow_pickle=False) as file:
        if not hasattr(file, "files"):
            raise ValueError("it holds a single array")
        arrays = {name: file[name] if name in wanted else np.empty(0) for name in file.files}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy hands out the bytes of what does not begin like an array
            raise ValueError(f"{name} is no array")
    return arrays


def listed(names: Iterable[str]) -> str:
    """What is in a file, for a message: ``"mu, sigma"``, or ``"nothing"``."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)[:200] or "nothing"
