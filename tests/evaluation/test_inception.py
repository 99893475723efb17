"""Inception features and figures, compared with torch-fidelity's on the same images and random weights."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.refusal import refused

from pra.evaluation import metrics
from pra.evaluation.evaluate import evaluate
from pra.evaluation.features import DINOV2_SHA256, Features, dinov2, inception
from pra.evaluation.metrics import Moments, Protocol
from pra.evaluation.reference import from_batches
from pra.sampling.batches import Batch
from pra.utils import extras
from pra.utils.extras import install_command
from pra.utils.provenance import file_sha256

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def port(torchvision_shim):
    """Return the module of torch-fidelity that defines Inception."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install 'pra-pixels[eval]'")
    from torch_fidelity import feature_extractor_inceptionv3

    return feature_extractor_inceptionv3


@pytest.fixture(scope="module")
def weights(port, tmp_path_factory):
    """Save random weights, scaled so that activations vanish in no layer."""
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
def extractor(weights):
    return inception(weights, CPU)


def pixels(count, seed=0, size=20, channels=3):
    """Return random images, smooth enough to differ after Inception's resize."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=(size, size + 3), mode="bilinear").to(torch.uint8)


def test_features_are_torch_fidelitys_and_adms(extractor, port, weights):
    """Spatial features are the first 7 channels of ADM's ``mixed_6/conv:0``, channels last."""
    from torch_fidelity.utils import create_feature_extractor

    names, how = ["2048", "logits_unbiased"], {"cuda": False, "verbose": False}
    theirs = create_feature_extractor("inception-v3-compat", names, feature_extractor_weights_path=str(weights), **how)
    images, block = pixels(2), []
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: block.append(output))
    expected_pool, expected_logits = theirs(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the extractor ignores autocast
        pool, spatial, logits = extractor(images)
    assert torch.equal(pool, expected_pool)
    assert torch.equal(logits, expected_logits)
    assert pool.std(dim=0).mean() > 1e-3  # features differ between images
    assert spatial is not None
    assert torch.equal(spatial.view(2, 17, 17, 7), block[0][:, :7].permute(0, 2, 3, 1))
    assert extractor.fingerprint == file_sha256(weights)
    # Grey is repeated to RGB; other numbers of channels are refused.
    grey = pixels(1, channels=1)
    assert torch.equal(extractor(grey).pool, extractor(grey.repeat(1, 3, 1, 1)).pool)
    refused(lambda: extractor(pixels(1, channels=4)), code="mismatch", channels=4)


def test_figures_of_features_are_torch_fidelitys(port):
    """Compare figure by figure. Correlated ReLU-like features make the figures well-conditioned."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator) / 7
    real = (torch.randn(900, 48, generator=generator) @ mixing).relu()
    features = (torch.randn(700, 48, generator=generator) @ mixing + 0.2).relu(), real
    statistics = [fid_features_to_statistics(rows) for rows in features]
    fid = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    moments = [Moments.of(rows[:64].numpy()) + Moments.of(rows[64:].numpy()) for rows in features]
    found = metrics.frechet_distance(*moments[0].gaussian, *moments[1].gaussian)
    assert found == pytest.approx(fid, rel=1e-6)

    logits = features[0]
    isc = isc_features_to_metric(logits)
    sums = metrics.score_sums(logits, Protocol.TORCH_FIDELITY.split_of(len(logits)), 10)
    expected = isc["inception_score_mean"], isc["inception_score_std"]
    assert metrics.inception_score(sums) == pytest.approx(expected, rel=1e-9)

    # Pass float64: torch-fidelity computes in the dtype of the features.
    kid = kid_features_to_metric(*(rows.double() for rows in features), kid_subset_size=90, verbose=False)
    distances = metrics.kernel_distance(*(rows.numpy() for rows in features), size=90)
    assert distances[1] > 1e-4  # the subsets differ
    expected = kid["kernel_inception_distance_mean"], kid["kernel_inception_distance_std"]
    assert distances == pytest.approx(expected, rel=1e-9)

    prc = prc_features_to_metric(*features, verbose=False)
    assert 0.1 < min(prc["precision"], prc["recall"]) < 0.9
    truth = metrics.Balls(features[1])
    shares = metrics.overlap(metrics.Balls(features[0], centre=truth.centre), truth)
    assert (shares["precision"], shares["recall"]) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)


def test_all_figures_from_images(port, weights, extractor):
    """Compare all figures with torch-fidelity's, from pixels on. To save time, only Inception's first layers run.

    Both take precision and recall from Inception, though torch-fidelity's default for them is VGG16.
    """
    from torch_fidelity import calculate_metrics, register_feature_extractor

    names, mixing = ["2048", "logits_unbiased"], torch.randn(64, 10, generator=torch.Generator().manual_seed(0))

    class First(port.FeatureExtractorInceptionV3):
        def forward(self, images):
            asked, self.features_list = self.features_list, ["64"]
            (pool,) = super().forward(images)
            self.features_list = asked
            return tuple(pool if name == "2048" else pool @ mixing for name in asked)

    class Images(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    register_feature_extractor("first", First)
    network = First("first", names, feature_extractor_weights_path=str(weights))

    def read(images):
        pool, logits = network(images)
        return Features(pool, None, logits)

    generated, real = pixels(12, seed=1), pixels(8, seed=2)
    expected = calculate_metrics(
        input1=Images(generated), input2=Images(real), cuda=False, isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=8, feature_extractor="first", feature_layer_prc="2048", verbose=False,
        feature_extractor_weights_path=str(weights), batch_size=16, save_cpu_ram=True, cache=False,
    )  # fmt: skip
    ours = replace(extractor, dim=64, read=read)
    reference = from_batches([Batch(real, None, 0)], ours, 8, "real", progress=False)
    report = evaluate([Batch(generated, None, 0)], reference, ours, 12, progress=False)
    figures = report.figures["torch-fidelity"]
    pairs = {
        "fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean", "inception_score_std": "inception_score_std",
        "precision": "precision", "recall": "recall",
    }  # fmt: skip
    for name, their in pairs.items():
        # torch-fidelity sums KID in float32, and KID is small here
        assert figures[name] == pytest.approx(expected[their], rel=1e-4, abs=1e-8 if name == "kid" else None)


# --- bad input ----------------------------------------------------------------------------------------------


def test_missing_extra_is_refused(tmp_path, monkeypatch):
    packages = {"torch_fidelity": (inception, "eval"), "timm": (dinov2, "dinov2")}
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    for name, (opener, extra) in packages.items():
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, name, None)
            refused(lambda opener=opener: opener(None, CPU), install_command(extra), code="not-installed")
    # A torchvision that was built for another torch.
    (tmp_path / "torch_fidelity.py").write_text("raise OSError('_C.so: undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extras, "package_version", lambda name: "0.99.0")
    parts = "torchvision 0.99.0", "_C.so: undefined symbol"
    refused(lambda: inception(None, CPU), *parts, code="not-installed")


def test_weights_that_are_not_inceptions_are_refused(port, tmp_path):
    path = tmp_path / "w.pth"
    refused(lambda: inception(path, CPU), code="unreadable", path=path)
    path.write_text("<html>")
    refused(lambda: inception(path, CPU), code="unreadable", path=path)
    for value in (torch.zeros(3), Path("x")):  # unpickling Path would call a function that the file names
        torch.save({"fc.weight": value}, path)
        refused(lambda: inception(path, CPU), code="unreadable", path=path)


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_weights_that_cannot_be_downloaded_are_refused(name, port, tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="dinov2 needs it") if name == "dinov2" else None
    opener, prefix = {"inception": (inception, "6726825d"), "dinov2": (dinov2, DINOV2_SHA256)}[name]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(url, path, hash_prefix):
        assert hash_prefix == prefix
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    refused(lambda: opener(None, CPU), "no network", "https://", "--weights FILE", code="unreachable")


def test_downloaded_weights_are_taken_from_the_cache(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(weights)
    assert inception(None, CPU).fingerprint == file_sha256(weights)
