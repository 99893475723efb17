"""The files that an evaluation writes: all at its end, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from pra.errors import PraError
from pra.utils.distributed import World
from pra.utils.files import unwritten
from pra.utils.locks import LOCK, locked
from pra.utils.signals import ended_by_sigterm


@dataclass(frozen=True)
class Outputs:
    """The files to write, if any; or where they lie until all are there."""

    report: Path | None = None
    images: Path | None = None
    statistics: Path | None = None

    def named(self) -> dict[str, Path]:
        """Those that are written."""
        return {field.name: path for field in fields(self) if (path := getattr(self, field.name))}

    def check(self) -> None:
        """Refuses what would overwrite or cannot be written, before any work is done.

        Raises:
            PraError: a file that is there already, is named twice or has another ending than its format, or a folder
                that is not there or not writable.
        """
        names: dict[Path, str] = {}
        for name, path in self.named().items():
            folder = path.absolute().parent
            if name in ("images", "statistics") and path.suffix.lower() != ".npz":
                raise PraError(f"{path}: the {name} are written as FILE.npz; choose such a file")
            if os.path.lexists(path):
                anew = "to measure anew" if name == "report" else "first"
                raise PraError(f"{path} exists already; choose another file, or remove it {anew}")
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise PraError(f"{path} cannot be written: {folder} is not there or not writable")
            if (same := names.setdefault(folder.resolve() / path.name, name)) != name:
                raise PraError(f"{path} cannot be both the {same} and the {name}; choose another file for one of them")

    @contextmanager
    def staged(self, world: World) -> Iterator[Outputs]:
        """Where the files lie until :meth:`publish`: each in a folder beside its place, ``.FILE.eval``, that goes at
        the end of the block, also on SIGTERM and Ctrl-C. What a killed process has left there, the next one removes.

        Args:
            world: the processes that share the work; all of them write there.

        Raises:
            PraError: another command writes one of the files, or the disk refuses.
        """
        folders = {path: path.with_name(f".{path.name}.eval") for path in self.named().values()}
        with ended_by_sigterm(), ExitStack() as stack:
            for folder in folders.values():
                stack.callback(_remove, folder)  # of all processes the last one can
                if world.is_first:
                    stack.enter_context(locked(folder, "filled", "choose another file"))
                    stack.callback(_clear, folder)
                    _clear(folder)
            world.barrier()  # the folders are there
            yield Outputs(*(path and folders[path] / path.name for path in astuple(self)))

    def publish(self, staged: Outputs) -> None:
        """Gives the files their names, one right after the other.

        Raises:
            PraError: a file of such a name has appeared, or the disk refuses.
        """
        self.check()
        for name, path in self.named().items():
            try:
                os.replace(getattr(staged, name), path)
            except OSError as error:
                raise unwritten(path, error) from None


def _clear(folder: Path) -> None:
    """Removes what lies in a folder, but for its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process is not done with it
        folder.rmdir()
