"""The command ``pra compare``: thin."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import File
from pra.errors import PraError
from pra.evaluation.compare import compared, overlaid, read_columns
from pra.utils.files import check_free, write_atomically


def compare_command(
    what: Annotated[Positional[tuple[str, ...]], arg(metavar="[NAME=]RUN|FILE.json", help_behavior_hint="")],
    *,
    out: File = None,
) -> None:
    """Put runs and evaluations side by side: settings that differ, progress, losses and figures.

    The figures of a run are those of RUN/figures.json, which `pra eval RUN --out RUN/figures.json` writes. The best of
    a row is marked if figures compare: same features, reference, number of images and protocol. Otherwise a line says
    which report differs, and in what.

    Args:
        what: Two or more runs' folders or JSONs that `pra eval --out` wrote; NAME= names the column.
        out: Also draw the curves of the runs over each other, as FILE.png.
    """
    picture = out and out.expanduser()
    if picture:
        if picture.suffix.lower() != ".png":
            raise PraError(f"{picture}: the curves are written as .png. Use FILE.png", path=picture)
        check_free(picture)
    columns = read_columns(what)
    figure = overlaid(columns) if picture else None
    print(compared(columns))
    if figure and picture:
        write_atomically(picture, lambda file: figure.savefig(file, format="png"))
        print(f"curves: {picture}")
