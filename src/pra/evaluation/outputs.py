"""The files that an evaluation writes: all at its end, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pra.errors import PraError
from pra.utils.distributed import World
from pra.utils.files import check_free
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


@contextmanager
def unfinished(path: Path | None, world: World) -> Iterator[Path | None]:
    """Yield a place for a file until it is finished, ``.FILE.eval`` beside it, which goes at the end of the block.

    It goes on SIGTERM and Ctrl-C too.
    """
    place = path and path.with_name(f".{path.name}.eval")
    with ended_by_sigterm():
        try:
            if place and world.is_first:
                place.parent.mkdir(parents=True, exist_ok=True)
            world.barrier()  # the folder is there
            yield place
        finally:
            if place and world.is_first:
                place.unlink(missing_ok=True)


def write_together(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Call each ``write(path)``; if one fails, remove what the others have written."""
    written: list[Path] = []
    try:
        for path, write in files.items():
            check_free(path, "choose another file")
            write(path)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
