"""The command ``pra distill``."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import Average, Device, Folder, Integer, Number, Settings
from pra.commands.train import changed, tell
from pra.models.weights import EMA
from pra.recipes.distill import configure, run_folder
from pra.training.loop import train
from pra.utils.distributed import join


def distill_command(
    run: Annotated[Positional[str], arg(metavar="RUN")],
    *,
    average: Average = EMA,
    run_dir: Folder = None,
    guidance: Number = None,
    steps: Integer = None,
    seed: Integer = None,
    device: Device = None,
    settings: Settings = (),
) -> None:
    """Teach a trained run to sample in few evaluations: a second head learns steps of the first one's flow.

    All other weights stay as they are. The new run is sampled with 4 evaluations a patch, or --steps 1, 2 or 8, and
    with another --solver as before. The same command resumes from its last checkpoint.

    Args:
        run: The run's folder.
        guidance: Teach it guided steps, up to this scale, such as 4: a guided image then takes as long as one without
            guidance.
        run_dir: The new run's folder; by default RUN-distilled.
        steps: Total number of steps, including those already done; by default 2000.
        seed: Decides data order and noise.
        settings: Any other setting, such as train.optimizer.lr=1e-4; may be repeated.
    """
    folder = (run_dir or run_folder(run)).expanduser()
    with join() as world:
        config = changed(configure(run, steps, average, guidance), {"train.seed": seed}, settings)
        result = train(config, folder, device=str(world.device(device)), world=world)
    if world.is_first:
        tell(result, config, folder)
