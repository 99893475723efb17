"""Sets of images that are collected and judged; the report; reconstructions."""

import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.judging import Projection, judged, pixels, reference_of, stream
from support.models import PIXEL, random_model
from support.refusal import refused

import pra
from pra.evaluation import metrics
from pra.evaluation.collect import Collector, collect
from pra.evaluation.evaluate import Report, describe, evaluate, reconstruct
from pra.evaluation.metrics import Balls, Protocol, overlap
from pra.evaluation.reference import from_file
from pra.sampling.batches import Batch
from pra.utils.provenance import package_version


def test_figures_do_not_depend_on_batches():
    extractor = Projection()
    reference = reference_of(pixels(60, seed=1), extractor)
    whole = judged(pixels(53), reference, extractor, size=53).figures
    assert whole["adm"]["sfid"] is not None
    for size in (1, 7, 52):
        for column, figures in judged(pixels(53), reference, extractor, size=size).figures.items():
            assert figures == pytest.approx(whole[column], rel=1e-6, abs=1e-8)


def test_processes_that_share_a_set_agree_with_one():
    extractor = Projection(classes=4)
    images, labels = pixels(53), torch.arange(53) % 4
    alone = Collector(extractor, 53, 20)
    alone.add(images, labels, 0)
    parts = [Collector(extractor, 53, 20) for _ in range(3)]
    for turn, start in enumerate(range(0, 53, 5)):  # in turns, so that merged features are out of order
        parts[turn % 3].add(images[start : start + 5], labels[start : start + 5], start)
    parts.append(Collector(extractor, 53, 20))  # one that saw nothing
    merged = parts.pop()
    for part in parts:
        merged.merge(part)
    merged.check_complete()
    spread_evenly = [place for place in range(53) if place * 20 // 53 < (place + 1) * 20 // 53]
    assert torch.allclose(alone.kept, extractor(images).pool[spread_evenly])
    assert torch.allclose(merged.kept, alone.kept)
    assert merged.accuracy == alone.accuracy
    np.testing.assert_allclose(merged.sums["pool"].mean, alone.sums["pool"].mean, rtol=1e-12)
    for name in ("pool", "spatial"):
        np.testing.assert_allclose(merged.sums[name].scatter, alone.sums[name].scatter, rtol=1e-6)
    for protocol in Protocol:
        assert merged.inception_score(protocol) == pytest.approx(alone.inception_score(protocol), rel=1e-6)


def test_identical_sets_are_at_distance_zero():
    extractor = Projection()
    for figures in judged(pixels(60), reference_of(pixels(60), extractor), extractor).figures.values():
        assert (figures["fid"], figures["sfid"]) == pytest.approx((0, 0), abs=1e-10)
        assert (figures["precision"], figures["recall"]) == (1, 1)
        assert figures["kid"] < 0  # unbiased: equal sets count their own pairs on one side only


def test_seams_are_held_against_the_reference(tmp_path):
    extractor, images = Projection(), pixels(30)
    reference_of(images, extractor).save(tmp_path / "s.npz")
    reference = from_file(tmp_path / "s.npz", extractor, progress=False)
    uneven = images.clone()
    uneven[:, :, 2:] //= 2  # a jump at the border of patches of 2

    def seams(images, reference):
        figures = [
            evaluate(stream(images, 7), reference, extractor, 30, progress=False, patch_size=size).figures
            for size in (2, None)
        ]
        assert "seams" not in figures[1]["adm"]
        return figures[0]["adm"].get("seams")

    assert seams(images, reference) == 1.0
    assert seams(uneven, reference) > 1.05
    assert seams(images, replace(reference, steps=None)) is None  # an older file


def test_images_are_let_go_as_they_are_judged():
    extractor = Projection()
    reference, alive = reference_of(pixels(60), extractor), []

    def made():
        for start in range(0, 200, 10):
            batch = Batch(pixels(10, seed=start), None, start)
            alive.append(weakref.ref(batch.images))
            assert sum(images() is not None for images in alive) <= 2
            yield batch

    evaluate(made(), reference, extractor, 200, keep=20, progress=False)
    assert len(alive) == 20


def test_protocols_judge_finished_images_once():
    extractor = Projection()
    reference = reference_of(pixels(40, seed=1), extractor)
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = evaluate(stream(images), reference, extractor, 40, progress=False)
    for protocol in Protocol:
        finished = judged(protocol.quantise(images), reference, extractor).figures[protocol.value]
        assert report.figures[protocol.value] == pytest.approx(finished)
    assert report.figures["adm"]["fid"] != report.figures["torch-fidelity"]["fid"]
    assert collect(stream(pixels(9)), extractor, 9, 9, progress=False).keys() == {Protocol.TORCH_FIDELITY}


def test_sets_that_cannot_be_judged_are_refused():
    extractor = Projection(classes=4)
    reference = reference_of(pixels(20), extractor)

    def refuse(batches, announced, code="mismatch", **fields):
        refused(lambda: evaluate(batches, reference, extractor, announced, progress=False), code=code, **fields)

    few = stream(pixels(20))
    refuse(stream(pixels(1)), 1, "invalid", value=1)
    refuse(few, 21, count=21)
    refuse(few, 19, count=19)
    refuse(stream(pixels(20, shape=(1, 2, 8))), 20, first="1x4x4", other="1x2x8")
    refuse(stream(pixels(20), labels=torch.arange(20) % 5), 20, label=4)
    large = [*few, Batch(pixels(3, shape=(1, 2, 8)), None, 20)]
    refused(lambda: collect(large, extractor, 23, 9, progress=False), code="mismatch", first="1x4x4", other="1x2x8")


def test_reference_of_other_features_is_refused():
    reference, other = reference_of(pixels(20), Projection()), Projection()
    other.fingerprint = "1" * 64
    inception, narrow = Projection(name="inception"), Projection(dim=4)
    for extractor, *pair in ((inception, "projection", "inception"), (other, "0" * 12, "1" * 12), (narrow, 5, 4)):
        fields = dict(zip(("reference", "features"), pair, strict=True))
        refused(lambda it=extractor: judged(pixels(20), reference, it), code="mismatch", **fields)


def test_few_images_leave_figures_out():
    extractor = Projection()
    report = judged(pixels(3), reference_of(pixels(20), extractor), extractor)
    figures = report.figures["torch-fidelity"]
    assert figures["inception_score"] is None
    assert "precision" not in figures
    assert figures["kid"] is not None
    assert json.loads(report.to_json())["figures"]["torch-fidelity"]["inception_score"] is None
    infinite = Report({"reconstruction": {"psnr": math.inf}}, {})
    assert json.loads(infinite.to_json())["figures"] == {"reconstruction": {"psnr": None}}
    assert infinite.table().splitlines()[1].split() == ["psnr", "inf"]


def test_report(tmp_path):
    extractor = Projection(classes=4)
    reference = reference_of(pixels(30), extractor)
    labels = extractor(pixels(20)).logits
    assert labels is not None
    report = evaluate(
        stream(pixels(20), labels=labels.argmax(dim=1)), reference, extractor, 20,
        provenance={"images": {"seeds": "0-19"}}, progress=False,
    )  # fmt: skip
    assert report.figures["adm"]["accuracy"] == 1.0
    report.save(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"]["adm"]["fid"] == report.figures["adm"]["fid"]
    known = written["provenance"]
    assert known["features"]["sha256"] == "0" * 64
    assert known["reference"]["sha256"] == reference.sha256
    assert (known["reference"]["count"], known["reference"]["shape"]) == (30, [1, 4, 4])
    assert (known["count"], known["images"]["seeds"]) == (20, "0-19")
    assert known["comparable_sha256"] == describe(extractor, reference, 20)["comparable_sha256"]
    lines = report.table().splitlines()
    assert lines[0].split() == ["adm", "torch-fidelity"]
    assert ["accuracy", "1", "1"] in [line.split() for line in lines]


def test_reconstruction():
    model = random_model(image_size=(12, 12))
    images, labels = pixels(6, shape=(3, 12, 12)), torch.arange(6) % 5
    extractor = Projection((3, 12, 12))
    figures = reconstruct(model, stream(images, 4, labels), extractor, 6, progress=False)
    copies = pra.to_uint8(model.reconstruct(images.float() / 127.5 - 1, labels))
    assert figures["psnr"] == pytest.approx(float(metrics.psnr(images, copies).mean()))
    assert figures["ssim"] == pytest.approx(float(metrics.ssim(images, copies).mean()))
    expected = judged(copies, reference_of(images, extractor), extractor).figures["adm"]["fid"]
    assert figures["reconstruction_fid"] == pytest.approx(expected, rel=1e-6)
    patch, sets = model.config.patch_size, (images, copies)
    real, copied = (metrics.seam_ratio(metrics.neighbour_steps(each), (12, 12), patch) for each in sets)
    assert figures["reconstruction_seams"] == pytest.approx(copied / real)
    small = stream(pixels(6, shape=(3, 6, 8)), 4, labels)
    assert reconstruct(random_model(), small, Projection((3, 6, 8)), 6, progress=False)["ssim"] is None
    refused(lambda: reconstruct(random_model(PIXEL), small, extractor, 6), "does not have a codec", code="unsupported")


def test_the_references_neighbours_are_found_once(monkeypatch):
    found = []
    whole = Balls.__init__

    def counted(self, features, *rest):
        found.append(len(features))
        whole(self, features, *rest)

    extractor, real, made = Projection(), pixels(30), torch.rand((20, 1, 4, 4)) * 2 - 1
    with monkeypatch.context() as counting:
        counting.setattr(Balls, "__init__", counted)
        figures = judged(made, reference_of(real, extractor), extractor).figures
    assert found == [30, 20, 20]
    truth = Balls(extractor(real).pool)
    for protocol in Protocol:
        expected = overlap(Balls(extractor(protocol.quantise(made)).pool, centre=truth.centre), truth)
        assert figures[protocol.value].items() >= expected.items()


@pytest.mark.parametrize(("name", "package"), [("inception", "torch-fidelity"), ("dinov2", "timm")])
def test_report_names_the_packages_of_features(name, package):
    extractor = Projection(name=name)
    versions = describe(extractor, reference_of(pixels(9), extractor), 9)["features"]["versions"]
    assert versions[package] == package_version(package)
    assert "torchvision" in versions
