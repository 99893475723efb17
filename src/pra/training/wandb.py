"""Metrics and pictures for Weights & Biases, as a callback of the training loop (extra ``wandb``)."""

from __future__ import annotations

from typing import Any

from pra.config import to_dict
from pra.errors import PraError
from pra.training.callbacks import Callback
from pra.training.loop import Trainer
from pra.utils.extras import import_failed
from pra.utils.files import read_regular, write_atomically

RUN_ID = "wandb-id.txt"
"""The file in the run's folder that names the run at Weights & Biases."""


class WandB(Callback):
    """Sends the run's configuration, every line of the metrics, and the pictures. Only rank 0 sends.

    A run that resumes continues the same run there. If lost steps are repeated, Weights & Biases keeps its own lines.
    ``settings`` are for ``wandb.init``, such as ``project="faces"`` or ``mode="offline"``.
    """

    def __init__(self, **settings: Any) -> None:
        try:
            import wandb
        except Exception as error:  # its dependencies raise any exception
            raise PraError(import_failed("pra.training.wandb", "wandb", "wandb", error), code="not-installed") from None
        self._wandb: Any = wandb
        self._settings = settings
        self._run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.world.is_first:
            return
        file = trainer.folder / RUN_ID
        known = {"id": read_regular(file, 1000).decode().strip(), "resume": "allow"} if file.exists() else {}
        defaults = {"name": trainer.folder.name, "dir": str(trainer.folder), "config": to_dict(trainer.config)}
        self._run = self._wandb.init(**{**defaults, **known, **self._settings})
        write_atomically(file, lambda out: out.write(f"{self._run.id}\n".encode()))

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        if self._run:
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=trainer.step)

    def on_sample(self, trainer: Trainer) -> None:
        files = {kind: trainer.picture(kind) for kind in ("samples", "reconstructions")}
        shown = {kind: self._wandb.Image(str(file)) for kind, file in files.items() if file.exists()}
        if self._run and shown:
            self._run.log(shown, step=trainer.step)

    def close(self) -> None:
        if self._run:
            self._run.finish()
