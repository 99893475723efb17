"""The extractor ``classifier``: a small CNN fitted on the reference, for data that Inception knows nothing about.

It is fitted once, with a fixed seed, and cached as safetensors under ``$XDG_CACHE_HOME/pra/classifiers`` by the hash of
the reference's images and labels and of the recipe. Another machine or number of threads rounds otherwise and ends in
another network: figures compare under one file alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pra.config import DataConfig
from pra.data import Source
from pra.errors import PraError, reason_of
from pra.evaluation.collect import shape_text
from pra.evaluation.features import Features
from pra.evaluation.samples import prepared
from pra.utils import files
from pra.utils.files import check_free, parse_json, write_atomically
from pra.utils.pixels import from_uint8
from pra.utils.progress import Progress
from pra.utils.provenance import file_sha256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a fit depends on besides the data; part of the cache's key.

    The fit takes ``epochs`` passes over the set, but at most ``most_steps`` batches. Every ``held_out``-th image
    measures the accuracy that a perfect sample would have.
    """

    version: int = 1
    epochs: int = 30
    most_steps: int = 1200
    batch: int = 128
    lr: float = 3e-3
    weight_decay: float = 1e-2
    smoothing: float = 0.1
    held_out: int = 10
    seed: int = 0


RECIPE = Recipe()

LARGEST = 2**32
"""Bytes of pixels that are held in memory for a fit."""

BLOCK = 512
"""Images in the network at a time."""


class Network(nn.Module):
    """Convolutions that halve the image down to 4 pixels or fewer; their average is the feature vector."""

    dim = 128

    def __init__(self, size: tuple[int, int], channels: int, classes: int) -> None:
        super().__init__()
        width, side = 16, min(size)
        layers = [_convolution(channels, width, stride=1)]
        while side > 4:
            layers.append(_convolution(width, min(2 * width, self.dim), stride=2))
            width, side = min(2 * width, self.dim), (side + 1) // 2
        layers.append(_convolution(width, self.dim, stride=1))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.dim, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images ``(B, C, H, W)`` in [-1, 1] to features ``(B, dim)`` and logits ``(B, classes)``."""
        pool = self.body(images).mean(dim=(2, 3))
        return pool, self.head(pool)


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier:
    """A fitted network as a feature extractor; its logits are of the data set's own ``classes``.

    ``accuracy`` is that on the images held out from the fit.
    """

    name = "classifier"
    dim = Network.dim

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.fingerprint = file_sha256(path)
        self.device = device
        with read_fitted(path, "a classifier") as (recorded, tensors):
            self.size: tuple[int, int] = tuple(recorded["size"])
            self.channels = int(recorded["channels"])
            self.classes: tuple[str, ...] | None = tuple(recorded["classes"])
            self.accuracy: float | None = float(recorded["accuracy"])
            with torch.device("meta"):  # random weights would cost time and change the random state
                self._network = Network(self.size, self.channels, len(self.classes))
            self._network.load_state_dict(tensors, assign=True)
        self._network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """See :meth:`pra.evaluation.features.FeatureExtractor.__call__`; images of the size it was fitted on."""
        check_shape(images, (self.channels, *self.size), "classifier")
        with torch.autocast(self.device.type, enabled=False):
            parts = [self._network(from_uint8(block.to(self.device))) for block in torch.split(images, BLOCK)]
        return Features(torch.cat([pool for pool, _ in parts]), None, torch.cat([logits for _, logits in parts]))


@contextmanager
def read_fitted(path: Path, what: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield the record and the tensors of :func:`write_fitted`; refuse a file that the block cannot use as ``what``."""
    try:
        with safe_open(path, framework="pt") as file:
            recorded = parse_json(file.metadata()["pra"].encode(), path, finite=True)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
        yield recorded, tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = f"{path} is not {what} of pra ({reason_of(error)})"
        raise PraError(f"{problem}. Remove it, or give another --weights", "unreadable", path=path) from None


def write_fitted(path: Path, network: nn.Module, recorded: dict[str, Any]) -> None:
    """Write a fitted network as safetensors, with ``recorded`` as JSON in its header."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    data = save(tensors, metadata={"pra": json.dumps(recorded)})
    write_atomically(path, lambda file: file.write(data))


def check_shape(images: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Refuse images ``(B, C, H, W)`` of another shape ``(C, H, W)`` than the network ``what`` was fitted on."""
    here, there = shape_text(tuple(images.shape[1:])), shape_text(shape)
    if here != there:
        problem = f"images of {here} (CxHxW): the {what} was fitted on {there}"
        fix = "Give a reference, or --weights, of their size and channels"
        raise PraError(f"{problem}. {fix}", "mismatch", images=here, fitted=there)


def cache_folder() -> Path:
    """Return the folder of fitted classifiers: ``$XDG_CACHE_HOME/pra/classifiers``, by default under ``~/.cache``."""
    return files.cache_folder() / "classifiers"


def find_classifier(fingerprint: str, device: torch.device) -> Classifier:
    """Open the classifier of the cache with this fingerprint."""
    for path in sorted(cache_folder().glob("*.safetensors")):
        if file_sha256(path) == fingerprint:
            return Classifier(path, device)
    problem = f"the classifier {fingerprint[:12]} of these statistics is not in {cache_folder()}"
    fix = "Give its file with --weights FILE, or images as --reference"
    raise PraError(f"{problem}. {fix}", "missing", sha256=fingerprint[:12])


def fit_classifier(
    source: Source,
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    device: torch.device,
    progress: bool = True,
    folder: Path | None = None,
) -> Classifier:
    """Open the classifier of a reference set, fitted once and kept in ``folder``, by default the cache.

    ``size`` (height and width), ``channels`` and ``config`` say how the images are prepared, without augmentation.

    Raises:
        PraError: one class, too few images or too many for the memory, images that cannot be prepared, or a folder
            that cannot be written.
    """
    fewest, pixels = 2 * RECIPE.held_out, len(source) * channels * size[0] * size[1]
    for wrong, problem in (
        (len(source.classes) < 2, "it has one class"),
        (len(source) < fewest, f"{len(source)} images, a classifier needs {fewest}"),
        (pixels > LARGEST, f"{pixels} bytes of pixels, at most {LARGEST}"),
    ):
        if wrong:
            text = f"--features classifier cannot be fitted on {source.name}: {problem}. Use --features inception"
            raise PraError(text, "unsupported", source=source.name)
    images, labels = load_all(source, range(len(source)), size, channels, config, progress)
    recipe = dataclasses.asdict(RECIPE)
    digest = hashlib.sha256(json.dumps([recipe, list(images.shape), list(source.classes)]).encode())
    digest.update(labels.numpy().tobytes())
    digest.update(images.numpy().data)
    path = (folder or cache_folder()) / f"{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        check_free(path, "choose another folder" if folder else "set XDG_CACHE_HOME")
        held_out = torch.arange(len(images)) % RECIPE.held_out == 0
        network = _fit(images, labels, torch.nonzero(~held_out).flatten(), len(source.classes), device, progress)
        with torch.no_grad():
            blocks = (from_uint8(block.to(device)) for block in torch.split(images[held_out], BLOCK))
            guesses = torch.cat([network(block)[1].argmax(dim=1).cpu() for block in blocks])
        recorded = {
            "size": size,
            "channels": channels,
            "classes": source.classes,
            "accuracy": float((guesses == labels[held_out]).double().mean()),
            "recipe": recipe,
            "source": source.name,
        }
        write_fitted(path, network, recorded)
    return Classifier(path, device)


def load_all(
    source: Source, chosen: Sequence[int], size: tuple[int, int], channels: int, config: DataConfig, progress: bool
) -> tuple[Tensor, Tensor]:
    """Return the ``N`` images ``chosen`` of a source, uint8 ``(N, C, H, W)``, and their labels ``(N,)``."""
    images = torch.empty((len(chosen), channels, *size), dtype=torch.uint8)
    labels = torch.empty(len(chosen), dtype=torch.int64)
    with (
        closing(prepared(source, chosen, size, channels, config, BLOCK)) as batches,
        Progress(total=len(chosen), desc="read reference", unit="image", disable=not progress) as bar,
    ):
        for batch in batches:
            here = slice(batch.start, batch.start + len(batch.images))
            images[here], labels[here] = batch.images, batch.labels  # type: ignore[assignment]
            bar.update(len(batch.images))
    return images, labels


def _fit(images: Tensor, labels: Tensor, fitted: Tensor, classes: int, device: torch.device, progress: bool) -> Network:
    """Fit to the images at the places ``fitted``: a function of its arguments and of ``RECIPE`` on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE.seed)
        network = Network((images.shape[2], images.shape[3]), images.shape[1], classes).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        chosen = fitted[torch.randint(len(fitted), (RECIPE.batch,), generator=generator)]
        _, logits = network(from_uint8(images[chosen].to(device)))
        return F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=RECIPE.smoothing)

    optimise(network, loss, RECIPE, len(images), device, "fit classifier", progress)
    return network.eval()


def optimise(
    network: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    recipe: Recipe,
    count: int,
    device: torch.device,
    what: str,
    progress: bool,
) -> None:
    """Minimise ``loss`` by AdamW, as the recipe says for a set of ``count`` images; ``what`` is the bar's name."""
    steps = min(recipe.epochs * count // recipe.batch + 1, recipe.most_steps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    flags: Any = torch.backends.cudnn.flags(enabled=device.type == "cuda", benchmark=False, deterministic=True)
    with flags, Progress(total=steps, desc=what, unit="step", disable=not progress) as bar:
        for _ in range(steps):
            value = loss(generator)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update()
