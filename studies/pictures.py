"""Samples of a study's systems: the same classes and seeds, a system a row, below real images."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pra.data import load_images, open_source
from pra.evaluation.sweep import labelled_rows
from pra.models import weights
from pra.sampling import Sampler
from pra.utils.pixels import contact_sheet
from studies.groups import Group
from studies.names import name_of
from studies.run import Job, Workplace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 10


def draw_samples(jobs: Sequence[Job], of: Sequence[Group], place: Workplace) -> Figure | None:
    """Samples of each system at its best guidance, the best system first; None without matplotlib or trained runs.

    Args:
        jobs: of one setting and seed. If a system has several values, such as lengths of training, the last counts.
        of: the figures of the same jobs.
        place: where their runs lie. Untrained runs are left out.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    last = {job.labels["system"]: job for job in jobs if place.trained(job)}
    trained = {(name, str(job.labels["value"])): job for name, job in last.items()}
    order = sorted((group for group in of if (group.system, str(group.value)) in trained), key=lambda group: group.fid)
    if not order:
        return None
    labels, real = _real(jobs[0])
    rows = [("training images", real)]
    for group in order:
        title = f"{name_of(group.system)}\nFID {group.fid:.2f}"
        rows.append((title, _sampled(trained[group.system, str(group.value)], group.guidance, labels, place)))
    return labelled_rows([(title, contact_sheet(images, COLUMNS)) for title, images in rows])


def _real(job: Job) -> tuple[list[int], Tensor]:
    """The first training images of as many classes as there are columns, over and over; their labels."""
    source, model = open_source(job.config.data.source), job.config.model
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(source.labels.tolist()):
        of_class.setdefault(label, []).append(index)
    labels = [sorted(of_class)[place % len(of_class)] for place in range(COLUMNS)]
    chosen = [of_class[label][place // len(of_class)] for place, label in enumerate(labels)]
    images, _ = load_images(source, chosen, model.image_size, model.channels, job.config.data)
    return labels, images


def _sampled(job: Job, guidance: float, labels: list[int], place: Workplace) -> Tensor:
    model = weights.load(place.folder(job), device=place.device)
    sampler = Sampler(model, replace(job.config.sampling, guidance=guidance))
    return sampler.sample(torch.tensor(labels), range(len(labels))).cpu()
