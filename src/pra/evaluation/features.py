"""Feature extractors: from uint8 images to the vectors whose distributions are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pra.errors import PraError, reason_of
from pra.utils.extras import import_failed
from pra.utils.files import check_regular
from pra.utils.provenance import file_sha256
from pra.utils.registry import Registry

EXTRACTORS = ("classifier", "dinov2", "inception")
"""Names of the package's own feature extractors."""


class Features(NamedTuple):
    """Features of ``B`` images, float32, or None for a kind that the extractor lacks.

    ``pool`` ``(B, D)`` serves FID, KID, precision and recall; ``spatial`` ``(B, S)``, unpooled, sFID; ``logits``
    ``(B, K)`` the Inception Score.
    """

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor | None


@runtime_checkable
class FeatureExtractor(Protocol):
    """A frozen network. ``fingerprint`` is the SHA-256 of its weights' file; figures of different ones do not compare.

    ``dim`` is the width of the pooled features. ``classes`` are the names behind the logits where these are the data
    set's own classes, and ``accuracy`` is how often they are right about real images.
    """

    name: str
    fingerprint: str
    dim: int
    device: torch.device
    classes: tuple[str, ...] | None
    accuracy: float | None

    def __call__(self, images: Tensor) -> Features:
        """Return features of uint8 images ``(B, C, H, W)``, each of its own image only."""
        ...


Opener = Callable[[Path | None, torch.device], FeatureExtractor]
"""Builds an extractor from the file that ``--weights`` names, or None, and the device."""

REGISTRY: Registry[Opener] = Registry("features", "pra.features", EXTRACTORS)


def register_features(name: str, function: Opener) -> None:
    """Register ``name`` as a choice of ``pra eval --features`` and ``pra sweep --features`` in this process.

    An installed package does the same for every process by an entry point of the group ``pra.features``.

    Args:
        name: of the features.
        function: builds the extractor; takes the file of ``--weights`` or None, and the device.

    Raises:
        PraError: the name is built in or malformed.
    """
    REGISTRY.add(name, function)


BLOCK = 64
"""Images in a network at a time, whatever the batch: at 299x299 pixels Inception needs 25 MB of memory for each."""


@dataclass(eq=False)
class Published:
    """A network with published weights. ``read`` returns the features of RGB images ``(B, 3, H, W)``, a few at a time.

    Grey images are shown as RGB. Always in float32: neither autocast nor TF32 changes a figure.
    """

    name: str
    dim: int
    fingerprint: str
    device: torch.device
    read: Callable[[Tensor], Features]
    classes: tuple[str, ...] | None = None
    accuracy: float | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """See :meth:`FeatureExtractor.__call__`; 1 or 3 channels of any size."""
        if images.shape[1] not in (1, 3):
            problem = f"{self.name} reads 1 or 3 channels, not {images.shape[1]}"
            raise PraError(f"{problem}. Convert the images to RGB", "mismatch", channels=images.shape[1])
        with exact(self.device):
            parts = [self.read(block.expand(-1, 3, -1, -1)) for block in torch.split(images, BLOCK)]
        columns = zip(*parts, strict=True)
        return Features(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in full float32, whatever the settings: no autocast, TF32, bfloat16 or trial runs of convolutions."""
    switches: Any = torch.backends
    cudnn, cpu = switches.cudnn, switches.mkldnn
    choice = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    allowed = {kind: kind.fp32_precision for kind in (switches.cuda.matmul, cudnn.conv, cpu.matmul, cpu.conv)}
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to tell after the newer switches were used
        matmul = None
    try:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = device.type == "cuda", False, True
        torch.set_float32_matmul_precision("highest")  # the older switch: torch complains where the two disagree
        for kind in allowed:
            kind.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        for kind, precision in allowed.items():
            kind.fp32_precision = "none"  # as is set for all kinds together
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = choice


def inception(weights: Path | None, device: torch.device) -> Published:
    """Open the extractor ``inception``: the InceptionV3 of FID, in torch-fidelity's port, at its own 299x299 pixels.

    Pooled features are its "2048", logits its "logits_unbiased". Spatial features are ADM's for sFID: the first 7
    channels of ``mixed_6/conv``, here ``Mixed_6d.branch1x1``, ``17 * 17 * 7 = 2023`` numbers with channels last.
    ``weights`` is torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth`` or one of its layout; None downloads
    that into torch's cache once.

    Raises:
        PraError: the extra is not installed, or the weights are missing or unreadable.
    """
    port = imported(
        "torch_fidelity.feature_extractor_inceptionv3", "--features inception", "torch-fidelity and torchvision", "eval"
    )
    url = port.URL_INCEPTION_V3
    path = weights or download(url, Path(url).stem.rsplit("-", 1)[1], "inception")
    with weights_of(path, "torch-fidelity's InceptionV3"):
        # torch-fidelity unpickles the file without restraint: read it first in the way that runs no code.
        torch.load(path, map_location="cpu", weights_only=True)
        network = port.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    network.to(device)
    spatial: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :7]))

    def read(images: Tensor) -> Features:
        pool, logits = network(images.to(device))
        return Features(pool, spatial.pop().permute(0, 2, 3, 1).flatten(1), logits)

    return Published("inception", 2048, file_sha256(path), device, read)


DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
"""SHA-256 of the file behind ``DINOV2_URL``. Meta does not publish it; many users have recorded this one."""

VIT_L: Mapping[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
PATCH = 14
SIDE = 224
"""Pixels of the images that the network sees."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's."""


def prepare(images: Tensor) -> Tensor:
    """Map uint8 images ``(B, 3, H, W)`` to the network's float32 ``(B, 3, 224, 224)``, normalised.

    Resized as the evaluator of Stein et al. does by default, by Pillow's bicubic in 8 bits: torch's antialiased bicubic
    rounds otherwise, by several levels at sharp edges.
    """
    pictures = map(Image.fromarray, images.permute(0, 2, 3, 1).cpu().numpy())
    resized = [np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for picture in pictures]
    values = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return (values - mean) / std


def dinov2(weights: Path | None, device: torch.device, architecture: Mapping[str, Any] = VIT_L) -> Published:
    """Open the extractor ``dinov2``: DINOv2's ViT-L/14 (2304.07193), whose Fréchet distance is FD-DINOv2 (2306.04675).

    Pooled features are the class tokens after the last norm, ``(B, 1024)``; there are no others. The network is timm's.
    ``weights`` is Meta's ``dinov2_vitl14_pretrain.pth``; None downloads that into torch's cache once. ``architecture``
    is smaller in tests. Refuse missing or unreadable weights; needs the extra.
    """
    timm = imported("timm.models.vision_transformer", "--features dinov2", "timm and torchvision", "dinov2")
    path = weights or download(DINOV2_URL, DINOV2_SHA256, "dinov2")
    with weights_of(path, "DINOv2's ViT-L/14"):
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors.pop("mask_token")  # of the training only
        tensors["pos_embed"] = _positions(tensors["pos_embed"])
        how = {"img_size": SIDE, "patch_size": PATCH, "num_classes": 0, "init_values": 1.0, **architecture}
        with torch.device("meta"):
            network = timm.VisionTransformer(**how)
        network.load_state_dict(tensors, assign=True)
    network = network.float().to(device).eval().requires_grad_(False)
    dim, fingerprint = int(network.num_features), file_sha256(path)
    return Published(
        "dinov2", dim, fingerprint, device, lambda images: Features(network(prepare(images).to(device)), None, None)
    )


def _positions(table: Tensor) -> Tensor:
    """Interpolate position embeddings ``(1, 1 + 37 * 37, D)`` of 518 pixels for 224, as DINOv2 does.

    By the factor ``16.1 / 37`` and not to the size 16, which gives other numbers; and without antialiasing.
    """
    before, after = round((table.shape[1] - 1) ** 0.5), SIDE // PATCH
    grid = table[:, 1:].float().mT.reshape(1, -1, before, before)
    grid = F.interpolate(grid, scale_factor=(after + 0.1) / before, mode="bicubic")
    return torch.cat([table[:, :1].float(), grid.flatten(2).mT], dim=1)


def imported(module: str, option: str, packages: str, extra: str) -> Any:
    """Import the module of a network from an optional package; ``option`` needs it. Refuse if it is missing."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:
        text = import_failed(option, packages, extra, error)
        raise PraError(text, "not-installed") from None


@contextmanager
def weights_of(path: Path, network: str) -> Iterator[None]:
    """Turn any error of unpickling, and a missing or misshapen tensor, into a PraError."""
    try:
        check_regular(path)
        yield
    except Exception as error:
        problem = f"{path} does not hold the weights of {network} ({reason_of(error)})"
        fix = "Give another --weights, or leave it out to download them"
        raise PraError(f"{problem}. {fix}", "unreadable", path=path) from None


def download(url: str, sha256: str, what: str) -> Path:
    """Return the file behind ``url``, from torch's cache if it is there, else checked by the beginning of its hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            problem = f"the weights of {what} cannot be downloaded ({reason_of(error)})"
            fix = f"Fetch {url} elsewhere and give it with --weights FILE"
            raise PraError(f"{problem}. {fix}", "unreachable", url=url) from None
    return path
