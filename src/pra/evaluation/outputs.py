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
from pra.utils.files import check_free, unwritten
from pra.utils.locks import LOCK, locked
from pra.utils.signals import ended_by_sigterm


@dataclass(frozen=True)
class Outputs:
    """The files to write, if any; or their places until all are there."""

    report: Path | None = None
    images: Path | None = None
    statistics: Path | None = None

    def named(self) -> dict[str, Path]:
        """Return the files that are written."""
        return {field.name: path for field in fields(self) if (path := getattr(self, field.name))}

    def check(self) -> None:
        """Refuse a file that is there already, is named twice, has a wrong ending or cannot be written."""
        names: dict[Path, str] = {}
        for name, path in self.named().items():
            if name != "report" and path.suffix.lower() != ".npz":
                raise PraError(f"{path}: the {name} are written as .npz. Use FILE.npz", path=path)
            check_free(path, "choose another file")
            if (same := names.setdefault(path.parent.resolve() / path.name, name)) != name:
                raise PraError(f"{path} cannot be both {same} and {name}. Use two files", "conflict", path=path)

    @contextmanager
    def staged(self, world: World) -> Iterator[Outputs]:
        """Yield places for the files until :meth:`publish`: each in a folder beside its own, ``.FILE.eval``.

        The folders go at the end of the block, also on SIGTERM and Ctrl-C. The next process removes what a killed one
        has left there. All processes of ``world`` write there.

        Raises:
            PraError: another command writes one of the files, or the disk refuses.
        """
        folders = {path: path.with_name(f".{path.name}.eval") for path in self.named().values()}
        with ended_by_sigterm(), ExitStack() as stack:
            for folder in folders.values():
                stack.callback(_remove, folder)  # only the last of the processes can
                if world.is_first:
                    stack.enter_context(locked(folder, "filled", "choose another file"))
                    stack.callback(_clear, folder)
                    _clear(folder)
            world.barrier()  # the folders are there
            yield Outputs(*(path and folders[path] / path.name for path in astuple(self)))

    def publish(self, staged: Outputs) -> None:
        """Give the files their names, one right after the other; refuse a name that has appeared meanwhile."""
        self.check()
        for name, path in self.named().items():
            try:
                os.replace(getattr(staged, name), path)
            except OSError as error:
                raise unwritten(path, error) from None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process still writes there
        folder.rmdir()
