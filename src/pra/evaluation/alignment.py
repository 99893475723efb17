"""Alignment of images with their captions: retrieval of captions by images, and the share of styles obeyed.

A dual encoder puts images and captions into one space. It is fitted on the data that a run learnt from, with a fixed
seed, and cached beside the classifiers; or it is a CLIP (2103.00020).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pra.config import DataConfig, OnCorrupt
from pra.data import Source
from pra.data.captions import CorruptCaption
from pra.data.source import Captioned, check_captions, in_classes
from pra.errors import PraError, reason_of
from pra.evaluation import classifier
from pra.evaluation.classifier import BLOCK, LARGEST, check_shape, load_all, optimise, read_fitted, write_fitted
from pra.evaluation.comparable import comparable_sha256
from pra.evaluation.evaluate import Figures, Report
from pra.evaluation.features import exact, imported, weights_of
from pra.evaluation.judging import Subject, Work, check_classes, check_processes, shuffled
from pra.evaluation.samples import captions_like, prepared
from pra.sampling.batches import Batch
from pra.sampling.requests import numbered
from pra.utils.files import check_free
from pra.utils.pixels import from_uint8, to_uint8
from pra.utils.progress import Progress
from pra.utils.provenance import environment, file_sha256, package_version

FITTED, CLIP = "fitted", "clip"
AMONG, SEED = 100, 0
"""Number of captions among which an image must find its own, and the seed that draws the others."""

RECIPE = classifier.Recipe(epochs=12, most_steps=2000, batch=128, weight_decay=5e-2)
DIM, SIDE, SHIFT, BUCKETS = 128, 32, 2, 2**14
"""Width of the features; most pixels per side; largest shift of the fit in pixels; size of the word table."""
RARE = 0.01
"""A style is named in at least this share of the images."""


class Aligner(Protocol):
    """A frozen dual encoder; features are float32, of length 1, on the CPU."""

    name: str
    fingerprint: str
    device: torch.device

    def images(self, images: Tensor) -> Tensor:
        """Return features ``(B, D)`` of uint8 images ``(B, C, H, W)``."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return features ``(N, D)`` of captions."""
        ...


# --- the fitted dual encoder ------------------------------------------------------------------------------------


class Network(nn.Module):
    """The classifier's convolutions for images, and for captions the mean of the embeddings of their words' parts.

    The order of words is ignored. A transformer over bytes learns more slowly: on 10,584 captioned emoji, after 80
    seconds of one core, it had an R@1 of 0.08 on held-out images, and these embeddings 0.57.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = min(size[0], SIDE), min(size[1], SIDE)
        self.eye = classifier.Network(self.size, channels, DIM)
        self.words = nn.EmbeddingBag(BUCKETS, DIM, mode="mean")
        self.reader = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def images(self, images: Tensor, shift: Sequence[int] = (0, 0)) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to unit vectors ``(B, DIM)``, ``shift`` pixels down and to the right."""
        small = F.adaptive_avg_pool2d(from_uint8(images), self.size)
        return F.normalize(self.eye(torch.roll(small, tuple(shift), (2, 3)))[1], dim=1)

    def texts(self, parts: Sequence[Sequence[int]]) -> Tensor:
        """Map the :func:`parts_of` ``N`` captions to unit vectors ``(N, DIM)``."""
        device = self.scale.device
        lengths = torch.tensor([len(own) for own in parts])
        flat = torch.tensor([part for own in parts for part in own], dtype=torch.int64)
        return F.normalize(self.reader(self.words(flat.to(device), (lengths.cumsum(0) - lengths).to(device))), dim=1)


def parts_of(text: str) -> list[int]:
    """Return the numbers of a text's words and of the three letters that follow each other in them."""
    words = re.findall(r"\w+", text.casefold())
    marked = [f"<{word}>" for word in words]
    parts = [*words, *(word[at : at + 3] for word in marked for at in range(len(word) - 2))]
    return [zlib.crc32(part.encode(errors="replace")) % BUCKETS for part in parts]


class CaptionEncoder:
    """A fitted :class:`Network`; ``styles`` are the styles in its captions."""

    name = "captions"

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device, self.fingerprint = path, device, file_sha256(path)
        with read_fitted(path, "an encoder of captions") as (recorded, tensors):
            self.shape = int(recorded["channels"]), *recorded["size"]
            self.styles: tuple[str, ...] = tuple(recorded["styles"])
            with torch.device("meta"):
                self._network = Network(self.shape[0], (self.shape[1], self.shape[2]))
            self._network.load_state_dict(tensors, assign=True)
        self._network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Return features of images of the size that it was fitted on; see :class:`Aligner`."""
        check_shape(images, self.shape, "encoder of captions")
        with exact(self.device):
            return torch.cat(
                [self._network.images(block.to(self.device)).cpu() for block in torch.split(images, BLOCK)]
            )

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return features of captions; see :class:`Aligner`."""
        with exact(self.device):
            return self._network.texts([parts_of(text) for text in texts]).cpu()


def fit_captions(
    source: Source,
    size: tuple[int, int],
    channels: int,
    config: DataConfig,
    device: torch.device,
    progress: bool = True,
) -> CaptionEncoder:
    """Open the dual encoder of a source with captions, fitted once and kept in the cache.

    ``size`` (height and width), ``channels`` and ``config`` say how the images are prepared, without augmentation.
    Images whose captions ``config.on_caption`` skips are left out.

    Raises:
        PraError: no captions, too many images for the memory, images that cannot be prepared, or a folder that cannot
            be written.
    """
    check_captions(source, config.on_caption)
    assert isinstance(source, Captioned)
    if (pixels := len(source) * channels * size[0] * size[1]) > LARGEST:
        problem = f"--alignment cannot be fitted on {source.name}: {pixels} bytes of pixels, at most {LARGEST}"
        raise PraError(f"{problem}. Give a file of another fit with --weights", "unsupported", source=source.name)
    captions: dict[int, tuple[str, ...]] = {}
    for index in range(len(source)):
        try:
            captions[index] = source.captions(index)
        except CorruptCaption:
            if config.on_caption is OnCorrupt.ERROR:
                raise
    images = load_all(source, list(captions), size, channels, config, progress)[0]
    recipe, texts = dataclasses.asdict(RECIPE), list(captions.values())
    digest = hashlib.sha256(json.dumps([recipe, DIM, SIDE, BUCKETS, list(images.shape), texts]).encode())
    digest.update(images.numpy().data)
    path = classifier.cache_folder() / f"captions-{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        check_free(path, "set XDG_CACHE_HOME")
        network = _fit(images, texts, device, progress)
        recorded = {"size": size, "channels": channels, "styles": styles_of(texts)}
        write_fitted(path, network, recorded | {"recipe": recipe, "source": source.name})
    return CaptionEncoder(path, device)


def _fit(images: Tensor, captions: Sequence[Sequence[str]], device: torch.device, progress: bool) -> Network:
    """Minimise the symmetric contrastive loss: a function of its arguments and of ``RECIPE`` on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE.seed)
        network = Network(images.shape[1], (images.shape[2], images.shape[3])).to(device)
    parts = [[parts_of(text) for text in texts] for texts in captions]
    batch = min(RECIPE.batch, len(images))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(images), generator=generator)[:batch]
        drawn = torch.rand(batch, generator=generator).tolist()
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
        seen = network.images(images[chosen].to(device), shift)
        own = [parts[image] for image in chosen.tolist()]
        read = network.texts([texts[int(u * len(texts))] for texts, u in zip(own, drawn, strict=True)])
        logits = seen @ read.T * network.scale.exp().clamp(max=50)
        target = torch.arange(batch, device=device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimise(network, loss, RECIPE, len(images), device, "fit captions", progress)
    return network.eval()


def styles_of(captions: Iterable[Sequence[str]]) -> list[str]:
    """Return the names in ``NAME style``, a part of captions between commas, that are not rare; at least two.

    ``captions`` are those of each image.
    """
    named = [{piece for text in texts for piece in _pieces(text) if piece.endswith(" style")} for texts in captions]
    counts = Counter(name for names in named for name in names)
    found = sorted(name.removesuffix(" style") for name, count in counts.items() if count >= RARE * len(named))
    return found if len(found) > 1 else []


def _pieces(text: str) -> list[str]:
    return re.split(r"\s*,\s*", text.strip())


# --- CLIP -------------------------------------------------------------------------------------------------------

ARCHITECTURE = "ViT-B-32", "laion2b_s34b_b79k"
"""Name and weights, as open_clip calls them."""


class Clip:
    """The CLIP of :data:`ARCHITECTURE` by open_clip, with the weights of a file, by default downloaded."""

    name = CLIP
    styles: tuple[str, ...] = ()

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        library = imported("open_clip", "--alignment clip", "open_clip_torch", "clip")
        try:
            path = weights or Path(library.download_pretrained(library.get_pretrained_cfg(*ARCHITECTURE)))
        except Exception as error:
            problem = f"the weights of CLIP cannot be downloaded ({reason_of(error)})"
            raise PraError(f"{problem}. Give them with --weights FILE", "unreachable") from None
        with weights_of(path, f"CLIP's {ARCHITECTURE[0]}"):
            network, self._prepare = library.create_model_from_pretrained(ARCHITECTURE[0], pretrained=str(path))
        self._network = network.float().to(device).eval().requires_grad_(False)
        self._tokens = library.get_tokenizer(ARCHITECTURE[0])
        self.device, self.fingerprint = device, file_sha256(path)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Return features of images, grey ones shown as RGB; see :class:`Aligner`."""
        pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        pixels = torch.stack([self._prepare(Image.fromarray(picture)) for picture in pictures])
        with exact(self.device):
            parts = [self._network.encode_image(block.to(self.device)).cpu() for block in torch.split(pixels, 64)]
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return features of the first 77 tokens of captions; see :class:`Aligner`."""
        with exact(self.device):
            blocks = torch.split(self._tokens(list(texts)), 64)
            return F.normalize(torch.cat([self._network.encode_text(b.to(self.device)).cpu() for b in blocks]), dim=1)


# --- figures ----------------------------------------------------------------------------------------------------


def figures(seen: Tensor, captions: Sequence[str], aligner: Aligner, styles: Sequence[str]) -> Figures:
    """Measure how well the features ``seen`` ``(N, D)`` of images go with their captions.

    Returns:
        "retrieval_r1" and "retrieval_r10", the shares of images whose own caption is the best, or among the best ten,
        of :data:`AMONG` different captions; "style_obeyed", the share that :func:`obeyed` finds; of a CLIP
        "clip_score", 100 times the mean cosine, 0 where that is negative.
    """
    texts = sorted(set(captions))
    places = {text: place for place, text in enumerate(texts)}
    read, own = aligner.texts(texts), torch.tensor([places[caption] for caption in captions])
    others, generator = min(AMONG, len(texts)) - 1, torch.Generator().manual_seed(SEED)
    ranks = torch.empty(len(seen), dtype=torch.int64)
    for image, place in enumerate(own.tolist()):
        drawn = torch.randperm(len(texts) - 1, generator=generator)[:others]
        drawn += (drawn >= place).long()
        ranks[image] = (read[drawn] @ seen[image] >= read[place] @ seen[image]).sum()
    found: Figures = {f"retrieval_r{k}": float((ranks < k).double().mean()) for k in (1, 10)}
    found["style_obeyed"] = obeyed(seen, captions, aligner, styles)
    if aligner.name == CLIP:
        found["clip_score"] = 100 * float((seen * read[own]).sum(dim=1).clamp(min=0).mean())
    return found


def obeyed(seen: Tensor, captions: Sequence[str], aligner: Aligner, styles: Sequence[str]) -> float | None:
    """Return the share of images whose own caption fits best among the same caption in each of the ``styles``.

    Only captions that name a style count. Return None without such captions.
    """
    pieces = {place: _pieces(text) for place, text in enumerate(captions)}
    asked = {place: [name for name in styles if f"{name} style" in own] for place, own in pieces.items()}
    named = {place: f"{names[0]} style" for place, names in asked.items() if len(names) == 1}
    if not named or len(styles) < 2:
        return None
    put_in = [
        ", ".join(f"{name} style" if piece == own else piece for piece in pieces[place])
        for place, own in named.items()
        for name in styles
    ]
    read = aligner.texts(put_in).view(len(named), len(styles), -1)
    best = torch.einsum("nd,nsd->ns", seen[list(named)], read).argmax(dim=1)
    right = torch.tensor([styles.index(own.removesuffix(" style")) for own in named.values()])
    return float((best == right).double().mean())


def chance(captions: Sequence[str], styles: Sequence[str], like: Figures) -> Figures:
    """Return the value of ``like`` for images without any relation to their captions."""
    among = min(AMONG, len(set(captions)))
    levels = {f"retrieval_r{k}": min(1.0, k / among) for k in (1, 10)}
    if like["style_obeyed"] is not None:
        levels["style_obeyed"] = 1 / len(styles)
    return {**levels}


# --- the judgement ----------------------------------------------------------------------------------------------


def open_aligner(name: str, weights: Path | None, subject: Subject, work: Work) -> CaptionEncoder | Clip:
    """Open a dual encoder, by default one fitted on the run's data; ``weights`` names another fit."""
    own = subject.settings.data.source
    if name == FITTED and weights is None and not own:
        problem = f"{subject.target} does not name its data, which --alignment needs for its fit"
        raise PraError(f"{problem}. Give the file of a fit with --weights", "missing")
    source = work.open_source(own) if name == FITTED and weights is None else None
    with work.world.first_alone():  # downloads or fits; the other processes find it in the cache
        if name == CLIP:
            return Clip(weights, work.device)
        if source is None:
            assert weights is not None
            return CaptionEncoder(weights, work.device)
        how = subject.size, subject.channels, subject.settings.data, work.device, work.world.is_first
        return fit_captions(source, *how)


def asked_by_source(subject: Subject, source: Source, num: int | None) -> Subject:
    """Return the subject with ``num`` captions of a source, by default one of each image, and these images' labels."""
    model = subject.sampled("--alignment").model
    model.condition.texts([])  # refused by a model that does not read captions
    source = in_classes(source, model.classes) or source
    check_classes(source, model, "--reference")
    return _checked(_counted(subject, num or len(source)).labelled_like(source))


def asked_by_lines(subject: Subject, lines: Sequence[str], num: int | None) -> Subject:
    """Return the subject with these captions, which take turns up to ``num`` images, by default one each."""
    model = subject.sampled("--alignment").model
    texts = model.condition.texts(lines)
    labels = model.condition.parse(None, model.classes, texts)[:, 0].tolist()
    subject = _counted(subject, num or len(texts))
    return _checked(dataclasses.replace(subject, requests=numbered(subject.count, labels, captions=texts)))


def _counted(subject: Subject, count: int) -> Subject:
    known = subject.provenance | {"count": count, "seeds": f"0-{count - 1}"}
    return dataclasses.replace(subject, count=count, provenance=known)


def _checked(subject: Subject) -> Subject:
    """Return the subject; refuse one that is asked for a single caption."""
    captions = subject.requests.captions if subject.requests else None
    if captions is None or len(set(captions)) < 2:
        problem = f"--alignment: all captions are {(captions or [''])[0]!r:.80}"
        raise PraError(f"{problem}. Give different ones", "missing")
    return subject


def align(subject: Subject, source: Source | None, aligner: CaptionEncoder | Clip, work: Work) -> Report:
    """Judge the images of a subject, and the real images of the same captions where these are of a ``source``.

    Columns: "generated", "real" and "chance". Every process gets the report.

    Raises:
        PraError: fewer images than processes.
    """
    check_processes(work.world, subject.count)
    captions = subject.requests.captions if subject.requests else None
    assert captions is not None, "the subject was asked for captions"
    styles = aligner.styles or styles_of([text] for text in captions)
    share, columns = work.world.share(subject.count), {}
    streams = {"generated": subject.batches(share, work.batch_size)}
    if source is not None:
        there, _ = captions_like(source, subject.count, subject.settings.data.on_caption)
        places = [there[place] for place in shuffled(subject.count).tolist()]
        how = subject.size, subject.channels, subject.settings.data, work.batch_size
        streams["real"] = prepared(source, places, *how, share)
    for name, stream in streams.items():
        with closing(stream) as batches:
            seen = _features(batches, aligner, len(share), name, work)
        columns[name] = work.world.combine(seen, lambda parts: figures(torch.cat(parts), captions, aligner, styles))
    columns["chance"] = chance(captions, styles, columns["generated"])
    known = _described(aligner, captions, styles, source, subject.count)
    known |= {"images": subject.provenance, "environment": environment(), "processes": work.world.size}
    return Report(columns, known)


def _features(batches: Iterable[Batch], aligner: Aligner, count: int, what: str, work: Work) -> Tensor:
    parts = []
    with Progress(total=count, unit="image", desc=what, disable=not work.world.is_first) as bar:
        for batch in batches:
            pixels = batch.images if batch.images.dtype is torch.uint8 else to_uint8(batch.images)
            parts.append(aligner.images(pixels.cpu()))
            bar.update(len(pixels))
    return torch.cat(parts)


def _described(
    aligner: Aligner, captions: Sequence[str], styles: Sequence[str], source: Source | None, count: int
) -> dict[str, Any]:
    packages = ("open_clip_torch",) if aligner.name == CLIP else ()
    known: dict[str, Any] = {
        "features": {
            "name": aligner.name,
            "sha256": aligner.fingerprint,
            "device": str(aligner.device),
            "versions": {package: package_version(package) for package in packages},
        },
        "reference": {
            "name": source.name if source else "--captions",
            "captions": len(set(captions)),
            "sha256": hashlib.sha256(json.dumps([*captions]).encode()).hexdigest(),
        },
        "count": count,
        "among": min(AMONG, len(set(captions))),
        "seed_of_captions": SEED,
        "styles": list(styles),
    }
    return known | {"comparable_sha256": comparable_sha256(known)}
