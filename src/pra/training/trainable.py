"""Which parameters learn: ``train.trainable``, turned into ``requires_grad`` here and nowhere else."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from pra.config import TrainConfig
from pra.errors import PraError

NAMED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "all-but-codec": lambda name: not name.startswith("codec."),
    "shortcut": lambda name: name.startswith("shortcut."),
}
"""Sets of parameters that have a name of their own."""


def set_trainable(model: nn.Module, train: TrainConfig) -> None:
    """Let the parameters that ``train.trainable`` names learn, and freeze all others.

    Raises:
        PraError: an entry matches no parameter (the nearest names are given), or the codec is frozen in its warm-up.
    """
    names = [name for name, _ in model.named_parameters()]
    learning = {name for entry in train.trainable for name in _matching(entry, names)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    if train.codec_warmup and not codec_learns(model):
        problem = (
            f"train.codec_warmup {train.codec_warmup}: train.trainable freezes the codec, so nothing would learn. "
            "Set train.codec_warmup=0"
        )
        raise PraError(problem, code="conflict", value=train.codec_warmup)


def codec_learns(model: nn.Module) -> bool:
    """Return whether the model has a codec of which a parameter learns."""
    return any(p.requires_grad for name, p in model.named_parameters() if name.startswith("codec."))


def _matching(entry: str, names: list[str]) -> list[str]:
    wanted = NAMED.get(entry)
    found = [name for name in names if (wanted(name) if wanted else fnmatchcase(name, entry))]
    if found:
        return found
    parts = [f"{part}.*" for part in sorted({name.split(".")[0] for name in names})]
    modules = sorted({name[:end] for name in names for end, letter in enumerate(name) if letter == "."})
    known = [*NAMED, *names, *(f"{module}.*" for module in modules)]
    nearest = difflib.get_close_matches(entry, known, n=3) or [*NAMED, *parts]
    use = " or ".join(nearest)
    raise PraError(
        f"train.trainable: {entry!r} matches no parameter. Use {use}", code="unknown", value=entry, nearest=use
    )
