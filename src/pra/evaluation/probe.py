"""The linear probe: how well a linear classifier reads the class from a frozen model's features.

Vectors are standardised by the training set's mean and standard deviation: the batch norm without affine of MAE's
linear probe (arXiv 2111.06377, appendix A.1), with statistics of the whole set instead of a batch. Learning rate or L2
is chosen on a tenth of the training set, then the classifier is fitted again on all of it. The held-out set is looked
at once, and chooses nothing.

The backbone reads clean patches under the null class, so that nothing in the features can come from the label.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pra.config import DataConfig
from pra.data import Source, open_source
from pra.data.source import SPLIT
from pra.errors import PraError, nearest
from pra.evaluation.samples import prepared, spread
from pra.method import flow, noise
from pra.models import Model
from pra.sampling.batches import Batch
from pra.utils.distributed import ALONE, World
from pra.utils.extras import install_command
from pra.utils.files import new_file
from pra.utils.pixels import from_uint8
from pra.utils.progress import Progress

VALIDATED = 10
"""Every tenth image of the training set is for validation."""
EPOCHS, BATCH, WARMUP, SEED = 30, 256, 0.1, 0
FEWEST_BATCHES = 16
"""Per epoch: small sets have smaller batches."""
NOISE_SEED = 0
PIXELS_SIDE = 32
"""Raw pixels of larger images are averaged down to this many a side."""

# --- features -----------------------------------------------------------------------------------------------

POOLINGS = ("mean", "last", "both")
"""One vector of an image's tokens: their mean, the last in raster order, or both one after the other.

In a causal model only the last token has seen the whole sequence.
"""

Pooled = dict[tuple[int | None, str | None], Tensor]
"""One vector per image, ``(B, D)``, by layer and pooling (mean or last); both are None for raw pixels."""


def poolings(vectors: Pooled) -> Iterator[tuple[int | None, str | None, Tensor]]:
    """Yield layer, pooling and vectors; where mean and last are known, also both, ``(B, 2 D)``."""
    for (layer, pooling), found in vectors.items():
        yield layer, pooling, found
        if pooling == "last":
            yield layer, "both", torch.cat([vectors[layer, "mean"], found], dim=1)


class Layers:
    """Mean and last token behind some layers of a model, counted from 1: float32 :data:`Pooled`.

    Each token is divided by its root mean square before the mean, where iGPT (Chen et al., ICML 2020) normalises too.
    In an autoregressive model the last patch is never an input: the tokens are those of the ``N - 1`` before it. Class
    tokens do not count. Where every token sees all others, the last is like any other: then the mean is the only
    pooling. ``time`` in [0, 1] is the flow time at which JiT reads the image, 1 being the clean one; below that every
    image gets noise of its own.

    Raises:
        PraError: a layer that the model does not have, or a time that does not suit it.
    """

    def __init__(self, model: Model, layers: Sequence[int], time: float | None = None, name: str = "features") -> None:
        for layer in layers:
            if not 1 <= layer <= len(model.blocks):
                problem = f"the model does not have layer {layer}"
                raise PraError(f"{problem}. Use layers 1 to {len(model.blocks)}", "unknown", layer=layer)
        if model.config.reading_time is None:
            if time is not None:
                raise PraError(f"--time {time} is for JiT, and this model reads clean images. Leave it out", value=time)
        elif time is None or not 0 <= time <= 1:
            raise PraError(f"--time {time} is not a flow time. Give one from 0 (noise) to 1 (the image)", value=time)
        self.model, self.layers, self.time, self.name = model, list(layers), time, name
        self.device = model.device

    @torch.no_grad()
    def __call__(self, images: Tensor, start: int) -> Pooled:
        """Return the vectors of images ``start, start + 1, ...`` of a set, ``(B, C, H, W)`` in [-1, 1]."""
        model, t, found = self.model, None, {}

        def keep(layer: int, output: Tensor) -> None:
            tokens = output[:, model.prefix :].float()
            tokens = F.rms_norm(tokens, tokens.shape[-1:], eps=1e-6)
            found[layer, "mean"], found[layer, "last"] = tokens.mean(dim=1), tokens[:, -1].clone()

        patches = model.patchify(images)
        unlabelled = model.condition.null_like(torch.empty(len(images), dtype=torch.int64, device=images.device))
        if self.time is not None:
            keys = noise.keys(NOISE_SEED, torch.arange(start, start + len(images))).to(images.device)
            t = torch.full((1, 1), self.time, device=images.device)
            patches = flow.interpolate(noise.normal(keys, *patches.shape[1:]), patches, t.unsqueeze(-1))
        with ExitStack() as hooks:
            for layer in self.layers:
                block = model.blocks[layer - 1]
                hooks.enter_context(block.register_forward_hook(lambda *args, layer=layer: keep(layer, args[-1])))
            model.read(unlabelled, patches, t)
        names = ("mean", "last") if model.config.autoregressive else ("mean",)
        return {(layer, name): found[layer, name] for layer in self.layers for name in names}


class Pixels:
    """The image itself, averaged down to at most ``PIXELS_SIDE`` pixels a side."""

    name, device = "pixels", torch.device("cpu")

    def __call__(self, images: Tensor, start: int) -> Pooled:
        """Return the vectors of images ``(B, C, H, W)``."""
        size = min(images.shape[2], PIXELS_SIDE), min(images.shape[3], PIXELS_SIDE)
        return {(None, None): F.adaptive_avg_pool2d(images, size).flatten(1)}


Vectors = Layers | Pixels


def _pooled(
    vectors: Vectors, batches: Iterable[Batch], count: int, what: str, progress: bool = True
) -> Iterator[tuple[Pooled, Tensor]]:
    """Yield vectors and labels, int64 ``(B,)``, of each batch."""
    with Progress(total=count, unit="image", desc=what, disable=not progress) as bar:
        for batch in batches:
            assert batch.labels is not None, "sources have labels"
            yield vectors(from_uint8(batch.images.to(vectors.device)), batch.start), batch.labels
            bar.update(len(batch.images))


def export_features(
    path: Path, layer: Layers, pooling: str, batches: Iterable[Batch], count: int, known: dict[str, Any]
) -> None:
    """Write one pooling of one layer to an ``.npz``, batch by batch: memory holds the features of one batch.

    ``features`` is float32 ``(count, D)``, ``labels`` int64 ``(count,)``, and ``pra`` the JSON text of ``known``. The
    file appears after the last batch, whole or not at all.

    Raises:
        PraError: the disk is full or refuses, or an image cannot be read; nothing is left behind.
    """
    width = layer.model.config.width * (2 if pooling == "both" else 1)
    labels = []
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as array:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
            np.lib.format.write_array_header_1_0(array, header)
            for pooled, truth in _pooled(layer, batches, count, layer.name):
                (chosen,) = (found for _, name, found in poolings(pooled) if name == pooling)
                array.write(chosen.cpu().numpy().astype("<f4").tobytes())
                labels.append(truth)
                del pooled, chosen  # before the next batch is computed
        for name, values in (("labels", torch.cat(labels).numpy()), ("pra", np.array(json.dumps(known)))):
            with archive.open(f"{name}.npy", "w") as array:
                np.lib.format.write_array(array, values)


def check_memory(size: int) -> None:
    """Refuse ``size`` bytes of features where the machine's whole memory is less."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > there:
        problem = f"the features need {size / 2**30:.0f} GiB, this machine has {there / 2**30:.0f}"
        raise PraError(f"{problem}. Name fewer --layers, or give --num", "too-large")


# --- the task -----------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A kind of linear classifier; ``setting`` names what it leaves open, and ``values`` are the choice.

    ``fit(x, y, queries, classes, values, device)`` fits one to ``x`` ``(n, D)`` and ``y`` ``(n,)`` for each value and
    returns the classes ``(len(values), m)`` of ``queries`` ``(m, D)``.
    """

    name: str
    setting: str
    values: tuple[float, ...]
    fit: Callable[[Tensor, Tensor, Tensor, int, Sequence[float], torch.device], Tensor]


@dataclass(frozen=True)
class Figure:
    """One linear classifier, fitted to one vector of ``dim`` numbers per image.

    ``layer`` and ``pooling`` are None for raw pixels. ``top1`` on the held-out set and ``validation`` are accuracies, 0
    to 1; ``value`` (learning rate or C) was chosen by the latter, the first of equal ones.
    """

    layer: int | None
    pooling: str | None
    dim: int
    top1: float
    validation: float
    value: float


@dataclass(frozen=True)
class Task:
    """A labelled set to fit linear classifiers on, and a held-out one to judge them on.

    ``chosen`` and ``asked`` are the indices of the images taken of each; ``data`` says how they are prepared.
    """

    train: Source
    test: Source
    chosen: list[int]
    asked: list[int]
    data: DataConfig

    @staticmethod
    def open(data: DataConfig, train: str, test: str, num: int | None = None) -> Task:
        """Open two sources; take ``num`` images of each at most, evenly spread, by default all.

        Raises:
            PraError: a source that cannot be opened, the same one twice, other classes in one than in the other, fewer
                than 2, or too few images.
        """
        fitted, judged = open_source(train), open_source(test)
        chosen, asked = (spread(len(source), min(num or len(source), len(source))) for source in (fitted, judged))
        ours, theirs = (f"{', '.join(one.classes[:3])} ({len(one.classes)})" for one in (fitted, judged))
        for problem, wrong in (
            (f"the {len(chosen)} images taken of {train} are of one class", len(set(fitted.labels[chosen])) < 2),
            (f"{train} has the classes {ours} and {test} {theirs}", fitted.classes != judged.classes),
            (f"the probe is fitted on {test} itself. Give other images with --test", _place(train) == _place(test)),
            (f"{train} gives {len(chosen)} images, a probe needs {2 * VALIDATED}", len(chosen) < 2 * VALIDATED),
        ):
            if wrong:
                raise PraError(f"pra probe: {problem}", "conflict", train=train)
        return Task(fitted, judged, chosen, asked, data)

    def figures(
        self,
        vectors: Vectors,
        linear: Linear,
        size: tuple[int, int],
        channels: int,
        device: torch.device,
        batch_size: int = 256,
        progress: bool = True,
        world: World = ALONE,
    ) -> list[Figure]:
        """Return a figure per layer and pooling of a subject; processes that share the images get none but rank 0.

        ``size`` (height and width) and ``channels`` are those of the images; ``device`` runs the subject and SGD.

        Raises:
            PraError: images that cannot be prepared, or vectors beyond the memory.
        """
        found = []
        for source, chosen in ((self.train, self.chosen), (self.test, self.asked)):
            share = world.share(len(chosen))
            what, shown = f"{vectors.name}: {source.name}", progress and world.is_first
            own: list[tuple[Pooled, Tensor]] = []
            with closing(prepared(source, chosen, size, channels, self.data, batch_size, share)) as batches:
                for pooled, labels in _pooled(vectors, batches, len(share), what, shown):
                    if not own:
                        check_memory(4 * len(share) * sum(part.shape[1] for part in pooled.values()))
                    own.append(({name: part.cpu() for name, part in pooled.items()}, labels))
            shares: list[list[tuple[Pooled, Tensor]]] = []
            world.combine(own, shares.extend)  # on rank 0 alone
            if world.is_first:
                found.append(_joined(list(itertools.chain(*shares))))
        if not world.is_first:
            return []
        (whole, y), (asked, truth) = found
        result = []
        for (layer, pooling, x), (*_, queries) in zip(poolings(whole), poolings(asked), strict=True):
            measured = accuracy(linear, (x, y), (queries, truth), len(self.train.classes), device)
            result.append(Figure(layer, pooling, x.shape[1], *measured))
        return result


def _joined(parts: list[tuple[Pooled, Tensor]]) -> tuple[Pooled, Tensor]:
    """Join batches, and free each part when it is joined."""
    whole = {name: torch.cat([pooled.pop(name) for pooled, _ in parts]) for name in list(parts[0][0])}
    return whole, torch.cat([labels for _, labels in parts])


def held_out(source: str) -> str:
    """Return ``"digits@test"`` of ``"digits"``; refuse a source without a held-out part."""
    if source.endswith("@test") or source.partition(":")[0] not in SPLIT:
        problem = f"{source} has no held-out part known to pra. Name one with --test SRC"
        raise PraError(problem, "missing", source=source)
    return f"{source}@test"


def _place(source: str) -> tuple[str, str]:
    """Return the same of ``folder:x`` and ``folder:x/``."""
    kind, _, path = source.partition(":")
    return kind, os.path.realpath(os.path.expanduser(path))


# --- classifiers --------------------------------------------------------------------------------------------


def accuracy(
    linear: Linear, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: int, device: torch.device
) -> tuple[float, float, float]:
    """Fit to vectors ``(n, D)`` with labels; return accuracies on the held-out set and in validation, and the value."""
    (x, y), (queries, truth) = train, test
    held = torch.arange(len(x)) % VALIDATED == 0
    fitted, validated = _standardised(x[~held], x[held])
    right = linear.fit(fitted, y[~held], validated, classes, linear.values, device) == y[held]
    validation = right.double().mean(dim=1)
    chosen = int(validation.argmax())
    fitted, asked = _standardised(x, queries)
    said = linear.fit(fitted, y, asked, classes, linear.values[chosen : chosen + 1], device)
    return (said[0] == truth).double().mean().item(), validation[chosen].item(), linear.values[chosen]


def find_linear(name: str) -> Linear:
    """Return a kind of classifier by its name."""
    if name not in LINEAR:
        raise PraError(f"--classifier {name!r} is unknown{nearest(name, LINEAR)}", "unknown", value=name)
    return LINEAR[name]


def _standardised(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise both by the mean and deviation of ``x``; what does not vary becomes zero."""
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    scale = (variance + 1e-6).rsqrt()
    return (x - mean) * scale, (queries - mean) * scale


def _sgd(x: Tensor, y: Tensor, queries: Tensor, classes: int, values: Sequence[float], device: torch.device) -> Tensor:
    """SGD with momentum, no weight decay, a cosine after a warm-up; one classifier per rate, on the same batches.

    The schedule is MAE's, at a batch small enough to do without LARS. Features are fixed, hence no augmentation.
    """
    x, y, queries = x.to(device), y.to(device), queries.to(device)
    weight = torch.zeros(len(values), x.shape[1], classes, device=device, requires_grad=True)
    bias = torch.zeros(len(values), 1, classes, device=device, requires_grad=True)
    # Without weight decay a loss times a rate is learnt at that rate: all classifiers are one parameter.
    rates = torch.tensor(values, device=device)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    size = max(1, min(BATCH, len(x) // FEWEST_BATCHES))
    per_epoch = len(x) // size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / (EPOCHS * per_epoch)))
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)[: per_epoch * size].to(device)
        for rows in torch.split(order, size):
            logits = x[rows] @ weight + bias
            truth = y[rows].unsqueeze(1).expand(-1, len(rates))
            losses = F.cross_entropy(logits.permute(1, 2, 0), truth, reduction="none")
            optimizer.zero_grad()
            (losses.mean(dim=0) @ rates).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return (queries @ weight + bias).argmax(dim=2).cpu()


def _rate(done: float) -> float:
    """Return the share of the full learning rate after a share ``done`` of the steps."""
    if done < WARMUP:
        return done / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


def _logistic(
    x: Tensor, y: Tensor, queries: Tensor, classes: int, values: Sequence[float], device: torch.device
) -> Tensor:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        text = f"--classifier logistic needs scikit-learn. Use sgd, or {install_command('train')}"
        raise PraError(text, "not-installed") from None
    said = []
    for value in values:
        # A tenth of scikit-learn's precision moves the accuracy by a fraction of its standard error.
        model = LogisticRegression(C=value, max_iter=1_000, tol=1e-3)
        model.fit(x.numpy(), y.numpy())
        said.append(torch.from_numpy(model.predict(queries.numpy())))
    return torch.stack(said)


LINEAR = {
    "sgd": Linear("sgd", "learning rate", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), _sgd),
    "logistic": Linear("logistic", "C", (1e-3, 1e-2, 1e-1, 1.0, 10.0), _logistic),
}
