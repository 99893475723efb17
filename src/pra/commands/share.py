"""The commands ``pra push`` and ``pra export``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pra.commands.options import Average, Flag, Folder, Settings, Text
from pra.config.values import parse_value
from pra.errors import PraError
from pra.models.weights import EMA, MODEL
from pra.sharing.push import export, push
from pra.utils.hub import PREFIX, repo_id

OF_SAMPLING = "sampling."


def push_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    repo: Annotated[Positional[str], arg(metavar="USER/MODEL")],
    *,
    private: Flag = False,
    licence: Text = None,
    half: Flag = False,
    average: Average = EMA,
    dry_run: Folder = None,
) -> None:
    """Share a run on the Hugging Face Hub, with a model card.

    One commit: configuration, weights, card, curves, the newest sample grid, and what `pra eval
    RUN --out RUN/figures.json` has measured of these weights. Needs the extra `hub` and a token (HF_TOKEN, or
    `hf auth login`).

    Args:
        run: A run's folder, a checkpoint, or a model folder; the card of a folder from `pra export` is kept.
        repo: The model's name on the Hub; it is made if needed.
        private: Hide it from everybody else.
        licence: The weights' licence, as the Hub names it, such as apache-2.0; without it the card says that it is
            missing.
        half: Store the weights as float16.
        dry_run: Write the upload into this new folder instead of uploading it.
    """
    if dry_run is not None:
        print(_told(export(run, dry_run, licence=licence, half=half, repo=repo, average=average)))
        print(f"nothing was uploaded to {repo_id(repo)}; without --dry-run this is")
        return
    print(f"pushed: {push(run, repo, private=private, licence=licence, half=half, average=average)}")
    print("next:", shlex.join(["pra", "sample", f"{PREFIX}{repo_id(repo)}"]))


def export_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    *,
    licence: Text = None,
    half: Flag = False,
    average: Average = EMA,
    settings: Settings = (),
) -> None:
    """Write a run's model, as `pra push` shares it, into a folder.

    Args:
        run: A run's folder, a checkpoint, or a model folder.
        folder: The new folder; `pra sample` and all other commands take it as RUN, and `pra push` uploads it unchanged.
        licence: The weights' licence, as the Hub names it, such as apache-2.0; without it the card says that it is
            missing.
        half: Store the weights as float16: half the size, and float32 again when loaded.
        settings: Default settings of the sampler, such as sampling.guidance=2 (`pra sweep` finds the best); may be
            repeated.
    """
    sampling = dict(map(_of_sampling, settings))
    print(_told(export(run, folder, licence=licence, half=half, average=average, sampling=sampling)))


def _of_sampling(line: str) -> tuple[str, Any]:
    name, equals, text = line.removeprefix(OF_SAMPLING).partition("=")
    if not equals or not line.startswith(OF_SAMPLING):
        problem = f"--set {line!r}: an exported model keeps settings of the sampler, such as sampling.guidance=2"
        raise PraError(problem, option="--set", value=line)
    return name, parse_value(text)


def _told(folder: Path) -> str:
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    return f"{folder}: {names}; weights of {(folder / MODEL).stat().st_size / 1e6:.1f} MB"
