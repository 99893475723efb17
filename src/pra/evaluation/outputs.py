"""The files that an evaluation writes: all at its end, or none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pra.errors import PraError
from pra.utils.distributed import World
from pra.utils.files import check_free, own_folder, unwritten
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
        if path.exists() and _place(path).parent.is_dir():  # of a command that was killed at its end
            with contextlib.suppress(PraError), locked(_place(path).parent, "filled", ""):
                _clear(_place(path).parent)
            _remove(_place(path).parent)
        check_free(path, "choose another file")
        if (same := names.setdefault(path.parent.resolve() / path.name, name)) != name:
            raise PraError(f"{path} cannot be both {same} and {name}. Use two files", "conflict", path=path)


@contextmanager
def staged(files: Mapping[str, Path], world: World) -> Iterator[dict[str, Path]]:
    """Yield a place for each of the named files until :func:`publish`, in a locked folder ``.FILE.eval`` beside it.

    Every rank may write there. The folders are removed at the end of the block, on SIGTERM and Ctrl-C too. Files that a
    killed command has left there are removed first.

    Raises:
        PraError: another command is writing one of the files, or the disk refuses.
    """
    places = {name: _place(path) for name, path in files.items()}
    with ended_by_sigterm(), ExitStack() as stack:
        for place in places.values():
            stack.callback(_remove, place.parent)  # on every rank: only the last rank finds the folder empty
            if world.is_first:
                stack.enter_context(locked(place.parent, "filled", "choose another file"))
                stack.callback(_clear, place.parent)
                _clear(place.parent)
        world.barrier()  # the folders exist on every rank
        yield places


def publish(places: Mapping[str, Path], files: Mapping[str, Path]) -> None:
    """Rename the finished files, the report last; if one fails, remove those already renamed.

    Raises:
        PraError: a file of that name has appeared, or the disk refuses.
    """
    with ExitStack() as published:
        for name, path in sorted(files.items(), key=lambda file: file[0] == "report"):
            check_free(path, "choose another file")
            try:
                os.replace(places[name], path)
            except OSError as error:
                raise unwritten(path, error) from None
            published.callback(path.unlink, missing_ok=True)
        published.pop_all()


def _place(path: Path) -> Path:
    return own_folder(path.with_name(f".{path.name}.eval")) / path.name


def _clear(folder: Path) -> None:
    """Remove the files in a folder, except for its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another rank still has a file there
        folder.rmdir()
