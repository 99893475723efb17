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


def check_outputs(**files: Path | None) -> None:
    """Refuse a file that is there already, is named twice, has a wrong ending or cannot be written.

    All but ``report`` are written as ``.npz``; None is a file that is not asked for.
    """
    names: dict[Path, str] = {}
    for name, path in files.items():
        if path is None:
            continue
        if name != "report" and path.suffix.lower() != ".npz":
            raise PraError(f"{path}: the {name} are written as .npz. Use FILE.npz", path=path)
        check_free(path, "choose another file")
        if (same := names.setdefault(path.parent.resolve() / path.name, name)) != name:
            raise PraError(f"{path} cannot be both {same} and {name}. Use two files", "conflict", path=path)


@dataclass(frozen=True)
class Outputs:
    """The files to write, or their places while they are unfinished; None is a file that is not asked for."""

    report: Path | None = None
    images: Path | None = None
    statistics: Path | None = None

    def named(self) -> dict[str, Path]:
        """Return the files that are asked for, by name."""
        return {field.name: path for field in fields(self) if (path := getattr(self, field.name))}

    def check(self) -> None:
        """Refuse what :func:`check_outputs` refuses."""
        check_outputs(**self.named())

    @contextmanager
    def staged(self, world: World) -> Iterator[Outputs]:
        """Yield a place for each file until :meth:`publish`, in a locked folder ``.FILE.eval`` beside the file.

        Every rank may write there. The folders are removed at the end of the block, on SIGTERM and Ctrl-C too. Files
        that a killed command has left there are removed first.

        Raises:
            PraError: another command is writing one of the files, or the disk refuses.
        """
        folders = {path: path.with_name(f".{path.name}.eval") for path in self.named().values()}
        with ended_by_sigterm(), ExitStack() as stack:
            for folder in folders.values():
                stack.callback(_remove, folder)  # on every rank: only the last rank finds the folder empty
                if world.is_first:
                    stack.enter_context(locked(folder, "filled", "choose another file"))
                    stack.callback(_clear, folder)
                    _clear(folder)
            world.barrier()  # the folders exist on every rank
            yield Outputs(*(path and folders[path] / path.name for path in astuple(self)))

    def publish(self, staged: Outputs) -> None:
        """Rename the finished files, the report last; if one fails, remove those already renamed.

        Raises:
            PraError: a file of that name has appeared, or the disk refuses.
        """
        published: list[Path] = []
        try:
            for name, path in reversed(self.named().items()):
                check_free(path, "choose another file")
                try:
                    os.replace(getattr(staged, name), path)
                except OSError as error:
                    raise unwritten(path, error) from None
                published.append(path)
        except BaseException:
            for path in published:
                path.unlink(missing_ok=True)
            raise


def _clear(folder: Path) -> None:
    """Remove the files in a folder, except for its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another rank still has a file there
        folder.rmdir()
