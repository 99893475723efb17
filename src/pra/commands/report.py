"""The command ``pra report``: thin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import Device, File
from pra.errors import PraError
from pra.evaluation.judging import check_at_least
from pra.evaluation.report import write_report
from pra.evaluation.rollout_gap import FILE, known_gap, measure_gap
from pra.training.run import read_run, write_json
from pra.utils.device import pick_device
from pra.utils.files import check_free


def report_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    out: File = None,
    gap_images: int = 200,
    device: Device = None,
) -> None:
    """Write a run's report: one HTML file with settings, curves, samples over training, rollout gap and figures.

    It needs no network, and can be made while the run trains. `pra train` makes one at its end, without measuring the
    rollout gap; figures that `pra eval RUN --out RUN/figures.json` has written are shown.

    Args:
        run: A run's folder.
        out: The file; by default report.html in the run's folder, where an older one is replaced.
        gap_images: Training images to measure the rollout gap with; 0 shows the last measurement, if there is one.
    """
    check_at_least(2, gap_images=gap_images or None)
    run = run.expanduser()
    config = read_run(run)
    path = out and out.expanduser()
    if path:
        if path.suffix.lower() != ".html":
            raise PraError(f"{path}: the report is written as .html. Use FILE.html", path=path)
        check_free(path)
    elif not os.access(run, os.W_OK):
        raise PraError(f"{run} cannot be written to. Use --out FILE.html", code="unwritable", path=run)
    gap, why = None, None
    if gap_images and config.model.autoregressive:
        target = pick_device(device)
        try:
            gap = known_gap(run, config, gap_images) or measure_gap(run, config, gap_images, target)
        except PraError as error:  # no checkpoint yet, or the data are elsewhere
            why = f"It could not be measured: {str(error).rstrip('.')}."
        else:
            if path is None:  # somebody else's folder may be read-only
                write_json(run / FILE, gap)
    print(f"report: {write_report(run, path, gap, why)}")
