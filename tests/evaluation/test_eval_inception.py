"""Figures equal to torch-fidelity's own, on the same images and (random) weights."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pra.errors import PraError
from pra.evaluation import metrics
from pra.evaluation.collect import collect
from pra.evaluation.evaluate import evaluate
from pra.evaluation.features import Inception, inception
from pra.evaluation.metrics import InceptionScore, Moments, Protocol
from pra.evaluation.reference import summarise
from pra.sampling.batches import Batch
from pra.utils import extras
from pra.utils.extras import install_command
from pra.utils.provenance import file_sha256

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def port(torchvision_shim: None) -> Any:
    """torch-fidelity's module of the network."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install 'pra-pixels[eval]'")
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


@pytest.fixture(scope="module")
def weights(port: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under which every layer is alive."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = port.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            fan_in = tensor[0].numel() if name != "fc.weight" else 200
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Inception:
    return inception(weights, CPU)


def pixels(count: int, seed: int = 0, size: int = 20, channels: int = 3) -> Tensor:
    """Smooth enough that images differ after Inception's resize."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(size, size + 3), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def theirs(port: Any, weights: Path) -> Any:
    """torch-fidelity's extractor, as torch-fidelity makes it for its metrics."""
    from torch_fidelity.utils import create_feature_extractor

    names = ["2048", "logits_unbiased"]
    return create_feature_extractor(
        "inception-v3-compat", names, cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )


def test_features_are_torch_fidelitys(extractor: Inception, theirs: Any) -> None:
    images = pixels(3)
    pool, spatial, logits = extractor(images)
    expected_pool, expected_logits = theirs(images)
    assert torch.equal(pool, expected_pool)
    assert torch.equal(logits, expected_logits)  # type: ignore[arg-type]
    assert pool.std(dim=0).mean() > 1e-3  # the images are told apart
    assert spatial is not None
    assert spatial.shape == (3, 2023)


def test_spatial_features_are_adms(extractor: Inception, theirs: Any) -> None:
    """``mixed_6/conv:0``: the first of the branches that make up the block, channels last, 7 of them."""
    block = []
    handle = theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: block.append(output))
    theirs(pixels(1))
    handle.remove()
    _, spatial, _ = extractor(pixels(1))
    assert spatial is not None
    assert torch.equal(spatial.view(17, 17, 7), block[0][0, :7].permute(1, 2, 0))


def test_grey_is_shown_as_rgb_and_nothing_else_is_read(extractor: Inception) -> None:
    grey = pixels(1, channels=1)
    assert torch.equal(extractor(grey).pool, extractor(grey.repeat(1, 3, 1, 1)).pool)
    with pytest.raises(PraError, match="1 or 3 channels, not 4"):
        extractor(pixels(1, channels=4))


def test_fingerprint(extractor: Inception, weights: Path) -> None:
    assert extractor.fingerprint == file_sha256(weights)


# --- metric by metric, on features that make well-conditioned figures ---------------------------------------


@pytest.fixture(scope="module")
def features(port: Any) -> tuple[Tensor, Tensor]:
    """Generated and real: ReLU-like, correlated, of different size and place."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator)
    real = torch.randn(900, 48, generator=generator) @ mixing / 7
    generated = torch.randn(700, 48, generator=generator) @ mixing / 7 + 0.2
    return generated.relu(), real.relu()


def test_fid(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(rows) for rows in features]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    moments = []
    for rows in features:
        moments.append(Moments(48))
        for block in rows.split(64):
            moments[-1].update(block.numpy())
    found = metrics.frechet_distance(*((part) for m in moments for part in (m.mean, m.covariance)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_inception_score(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = features[0]
    expected = isc_features_to_metric(logits)
    score = InceptionScore(len(logits), Protocol.TORCH_FIDELITY)
    for start in range(0, len(logits), 64):
        score.update(logits[start : start + 64], start)
    assert score.result() == pytest.approx(
        (expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-9
    )


def test_kid(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    # In float64, for torch-fidelity computes in the features' own type.
    expected = kid_features_to_metric(*(rows.double() for rows in features), kid_subset_size=90, verbose=False)
    found = metrics.kernel_distance(*(rows.numpy() for rows in features), size=90)
    assert found[1] > 1e-4  # the subsets differ
    assert found == pytest.approx(
        (expected["kernel_inception_distance_mean"], expected["kernel_inception_distance_std"]), rel=1e-9
    )


def test_precision_and_recall(features: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    expected = prc_features_to_metric(*features, verbose=False)
    assert 0.1 < min(expected["precision"], expected["recall"]) < 0.9
    assert metrics.precision_recall(*features) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_all_figures_from_images(port: Any, weights: Path, extractor: Inception) -> None:
    """torch-fidelity's command against ours, from pixels to figures.

    But for the network of precision and recall, which is Inception here and by default a VGG16 there.
    """
    from torch_fidelity import calculate_metrics

    class Images(torch.utils.data.Dataset[Tensor]):
        def __init__(self, images: Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    generated, real = pixels(12, seed=1), pixels(14, seed=2)
    expected = calculate_metrics(
        input1=Images(generated), input2=Images(real), cuda=False, isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=12, feature_extractor="inception-v3-compat", feature_layer_prc="2048", verbose=False,
        feature_extractor_weights_path=str(weights), batch_size=16, save_cpu_ram=True, cache=False,
    )  # fmt: skip
    collected = collect([Batch(real, None, 0)], extractor, 14, 14, progress=False)[Protocol.TORCH_FIDELITY]
    reference = summarise(collected, "real", None)
    report = evaluate([Batch(generated, None, 0)], reference, extractor, 12, progress=False)
    figures = report.figures["torch-fidelity"]
    pairs = {
        "fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean", "inception_score_std": "inception_score_std",
        "precision": "precision", "recall": "recall",
    }  # fmt: skip
    for ours, their in pairs.items():
        # theirs sums KID, which is small here, in float32
        assert figures[ours] == pytest.approx(expected[their], rel=1e-4, abs=1e-8 if ours == "kid" else None)


# --- bad input ----------------------------------------------------------------------------------------------


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(PraError, match=re.escape(install_command("eval"))) as raised:
        inception(None, CPU)
    assert "\n" not in str(raised.value)


def test_a_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torch_fidelity.py").write_text("raise OSError('_C.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extras, "package_version", lambda name: "0.99.0")
    with pytest.raises(PraError, match=r"torchvision 0\.99\.0 does not fit torch .*_C.so: undefined symbol") as raised:
        inception(None, CPU)
    assert "pip install -e" not in str(raised.value)


@pytest.mark.parametrize("content", ["nothing", "text", "tensors", "code"])
def test_weights_that_are_none(port: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "w.pth"
    if content == "text":
        path.write_text("<html>")
    elif content == "tensors":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    elif content == "code":
        torch.save({"fc.weight": Path("x")}, path)  # unpickling it would call what the file names
    with pytest.raises(PraError, match=r"w\.pth") as raised:
        inception(path, CPU)
    assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_downloaded(port: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(url: str, path: str, hash_prefix: str) -> None:
        assert hash_prefix == "6726825d"
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(PraError, match=r"no network.*--weights FILE") as raised:
        inception(None, CPU)
    assert "https://" in str(raised.value)


def test_downloaded_weights_are_taken_from_the_cache(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)
    assert inception(None, CPU).fingerprint == file_sha256(weights)


def test_it_computes_in_float32_under_autocast(extractor: Inception) -> None:
    plain = extractor(pixels(1)).pool
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(pixels(1)).pool, plain)
    assert np.isfinite(plain.numpy()).all()
