"""Feature extractors: from uint8 images to the vectors whose distributions are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pra.errors import PraError, reason_of
from pra.utils.extras import import_failed
from pra.utils.provenance import file_sha256
from pra.utils.registry import Registry

EXTRACTORS = ("classifier", "dinov2", "inception")
"""Names of the package's own feature extractors."""


class Features(NamedTuple):
    """What an extractor says about ``B`` images, float32.

    ``pool`` ``(B, D)`` serves FID, KID, precision and recall; ``spatial`` ``(B, S)``, unpooled, sFID; ``logits``
    ``(B, K)`` the Inception Score. None where an extractor has none.
    """

    pool: Tensor
    spatial: Tensor | None
    logits: Tensor | None


@runtime_checkable
class FeatureExtractor(Protocol):
    """A frozen network. ``fingerprint`` is the SHA-256 of its weights' file; figures of different ones do not compare.

    ``dim`` is the width of the pooled features, ``device`` where they are computed, and ``classes`` the names of
    what the logits stand for, in order, where that is the data set's own classes, and ``accuracy`` how often they are
    right about real images.
    """

    name: str
    fingerprint: str
    dim: int
    device: torch.device
    classes: tuple[str, ...] | None
    accuracy: float | None

    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images ``(B, C, H, W)``, each its own image's only.

        Raises:
            PraError: images of a shape that the network cannot read.
        """
        ...


Opener = Callable[[Path | None, torch.device], FeatureExtractor]
"""Builds an extractor from the file that ``--weights`` names, or None, and the device."""

REGISTRY: Registry[Opener] = Registry("features", "pra.features", EXTRACTORS)


def register_features(name: str, function: Opener) -> None:
    """Make ``name`` a choice of ``pra eval --features`` and ``pra sweep --features`` in this process.

    An installed package does the same for every process by an entry point of the group ``pra.features``.

    Args:
        name: of the features.
        function: builds the extractor; takes the file of ``--weights`` or None, and the device.

    Raises:
        PraError: the name is built in or malformed.
    """
    REGISTRY.add(name, function)


BLOCK = 64
"""Images in Inception at a time, whatever the batch: at 299x299 pixels it needs 25 MB of memory for each."""


class Inception:
    """The InceptionV3 of FID, in torch-fidelity's port (extra ``eval``), at its own 299x299 pixels.

    Pooled features are its "2048", logits its "logits_unbiased". Spatial features are ADM's for sFID: the first 7
    channels of ``mixed_6/conv``, here ``Mixed_6d.branch1x1``, ``17 * 17 * 7 = 2023`` numbers with channels last.
    Grey images are shown as RGB. Always in float32: neither autocast nor TF32 changes a figure.
    """

    name = "inception"
    dim = 2048
    classes: tuple[str, ...] | None = None
    accuracy: float | None = None

    def __init__(self, network: Any, fingerprint: str, device: torch.device) -> None:
        self.fingerprint = fingerprint
        self.device = device
        self._network = network.to(device)
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """As :meth:`FeatureExtractor.__call__`; 1 or 3 channels of any size."""
        if images.shape[1] not in (1, 3):
            raise PraError(f"inception reads 1 or 3 channels, not {images.shape[1]}; convert the images to RGB")
        pool, logits, spatial = [], [], []
        for block in torch.split(images, BLOCK):
            block = block.to(self.device).expand(-1, 3, -1, -1)
            with exact(self.device):
                block_pool, block_logits = self._network(block)
            assert self._spatial is not None
            pool.append(block_pool)
            logits.append(block_logits)
            spatial.append(self._spatial)
        return Features(torch.cat(pool), torch.cat(spatial), torch.cat(logits))

    def _keep_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """A block of full float32, whatever was allowed: no autocast, and neither TF32 nor bfloat16 inside convolutions and
    matrix products. Convolutions are chosen without trial runs."""
    cudnn: Any = torch.backends.cudnn
    choice, allowed = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic), _allowed()
    matmul = _matmul_precision()
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


def _allowed() -> dict[Any, str]:
    """What stands in for float32 in each kind of arithmetic that has a switch of its own."""
    switches: Any = torch.backends
    gpu, cpu = switches.cudnn, switches.mkldnn
    return {kind: kind.fp32_precision for kind in (switches.cuda.matmul, gpu.conv, cpu.matmul, cpu.conv)}


def _matmul_precision() -> str | None:
    """What the older switch says; None where the newer ones were used, after which torch refuses to tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def inception(weights: Path | None, device: torch.device) -> Inception:
    """The extractor ``inception``.

    Args:
        weights: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, or one of the same layout; None
            downloads that into torch's cache once.
        device: where it runs.

    Raises:
        PraError: the extra is not installed, or the weights cannot be had or read.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as port
    except (ImportError, RuntimeError, OSError) as error:
        raise PraError(import_failed("--features inception", "torch-fidelity and torchvision", "eval", error)) from None
    url = port.URL_INCEPTION_V3
    path = weights or download(url, Path(url).stem.rsplit("-", 1)[1], "inception")
    fingerprint = file_sha256(path)
    try:
        # torch-fidelity unpickles the file without restraint: read it first the way that runs no code.
        torch.load(path, map_location="cpu", weights_only=True)
        network = port.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except Exception as error:  # whatever unpickling stumbles over; and a missing or misshapen tensor
        raise PraError(
            f"{path} holds no weights of torch-fidelity's InceptionV3 ({reason_of(error)}); give another --weights, "
            "or none to download them"
        ) from None
    return Inception(network, fingerprint, device)


def download(url: str, sha256: str, what: str) -> Path:
    """The file behind ``url``, from torch's cache if it is there.

    Args:
        url: its last part names the file in the cache.
        sha256: of the file, or its first digits; checked when it is downloaded.
        what: the extractor, for the message.

    Raises:
        PraError: there is no network, no space, or another file.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise PraError(
                f"the weights of {what} cannot be downloaded ({reason_of(error)}); fetch {url} elsewhere and give it "
                "with --weights FILE"
            ) from None
    return path
