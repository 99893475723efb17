"""Comparisons of benchmarks/peers.py: others' models of our sizes, as many evaluations, figures that are not lost."""

import importlib.util
import json
import sys
from dataclasses import replace

import ar_diffusion
import peers
import peers_quality
import pytest
import sphere_ar
import torch
from ar_diffusion import diffusion_model, flow_model
from peers_quality import DISTILLED, THEIRS, Point, Ways, measure, needed, train_peer, unconditional
from support.models import LEARNED, PIXEL
from support.refusal import refused

from pra.training.run import read_run
from pra.utils.extras import install_command

SQUARE = replace(LEARNED, image_size=(6, 6))
there = pytest.mark.skipif(
    importlib.util.find_spec(ar_diffusion.NAME) is None,
    reason="autoregressive-diffusion-pytorch is not installed: pip install 'pra-pixels[bench]'",
)


def calls(model, images=2):
    """Return how often the head runs for a batch, and the images."""
    asked = []
    handle = model.model.denoiser.register_forward_hook(lambda *_: asked.append(1))
    pictures = model.sample(batch_size=images)
    handle.remove()
    return len(asked), pictures


@there
@pytest.mark.parametrize("evaluations", [2, 30])
def test_peers_have_our_sizes_and_evaluations(evaluations):
    model = flow_model(SQUARE, evaluations)
    asked, pictures = calls(model)
    assert asked == SQUARE.num_patches * evaluations
    assert pictures.shape == (2, 3, 6, 6)
    inner = model.model
    assert (inner.proj_in.out_features, inner.max_seq_len) == (SQUARE.backbone.width, SQUARE.num_patches)
    assert len(inner.denoiser.layers) == SQUARE.head.depth
    assert inner.denoiser.layers[0][1][0].out_features == 3 * SQUARE.head.width // 2
    assert flow_model(SQUARE, 2, mlp_width=40).model.denoiser.layers[0][1][0].out_features == 40
    attentions = [m for m in inner.transformer.modules() if type(m).__name__ == "Attention"]
    assert [a.heads for a in attentions] == [SQUARE.backbone.heads] * SQUARE.backbone.depth
    assert attentions[0].to_q.weight.shape == (SQUARE.backbone.width, SQUARE.backbone.width)
    assert calls(diffusion_model(SQUARE, evaluations + 1))[0] == SQUARE.num_patches * (evaluations + 1)
    lengths = []  # its transformer sees a token a step, as docs/performance.md says
    attentions[0].to_q.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    model.sample(batch_size=1)
    assert lengths == [1] * SQUARE.num_patches
    refused(lambda: flow_model(LEARNED, 2), "6x8 pixels", "square images")


def test_peers_that_cannot_be_compared_are_refused(monkeypatch):
    refused(lambda: flow_model(SQUARE, 5), "5 evaluations", "an even number of at least 2")
    refused(lambda: flow_model(SQUARE, 0), "0 evaluations", "an even number of at least 2")
    refused(lambda: diffusion_model(SQUARE, 4), "4 evaluations", "an odd number of at least 3")
    refused(lambda: peers.main("tiny:jit", threads="1"), "generates no patch after another")
    ar_diffusion.library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: flow_model(SQUARE, 2), "autoregressive-diffusion-pytorch", install_command("bench"))


@there
def test_every_row_of_a_run(capsys):
    peers.main("tiny", batch="1,2", threads="1", evaluations=2 * 2, repeats=1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["results"]) == 18
    assert {(row["batch"], row["threads"]) for row in found["results"]} == {(1, 1), (2, 1)}
    assert all(row[kind]["median"] > 0 for row in found["results"] for kind in ("clock", "processor"))
    assert {row["evaluations"] for row in found["results"] if row["name"] == "diffusion model"} == {3}


def test_ratios_are_of_pairs(monkeypatch):
    seconds = iter([(2.0, 8.0), (1.0, 1.0), (6.0, 4.0), (2.0, 2.0), (5.0, 9.0), (1.0, 3.0)])
    monkeypatch.setattr(peers, "taken", lambda work: next(seconds))
    clock, processor = peers.in_turn(lambda: None, lambda: None, 3)
    assert (clock.median, clock.lowest, clock.highest) == (3.0, 2.0, 5.0)
    assert (processor.median, processor.lowest, processor.highest) == (3.0, 2.0, 8.0)


MODEL = """
from flash_attn import flash_attn_func
import torch

class SphereAR(torch.nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.sizes, self.attention, self.vae = sizes, flash_attn_func, torch.nn.Module()
        self.vae.decode = lambda latents: 2 * latents

    @torch.compile()
    def sample(self, labels, sample_steps, cfg_scale):
        return self.vae.decode(torch.ones(len(labels), 1))
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like one."""
    (tmp_path / "SphereAR").mkdir()
    (tmp_path / "SphereAR" / "__init__.py").touch()
    (tmp_path / "SphereAR" / "model.py").write_text(MODEL)
    known, stance = set(sys.modules), torch.compiler.set_stance
    yield tmp_path
    stance("default")
    for name in set(sys.modules) - known:
        if name.startswith(("SphereAR", "flash_attn")):
            del sys.modules[name]


def test_sphere_ar_from_a_checkout(checkout):
    path = list(sys.path)
    model = sphere_ar.sphere_ar(checkout, SQUARE)
    assert sys.path == path
    names = ("dim", "n_layer", "n_head", "diff_dim", "diff_layers", "diff_adanln_layers", "latent_dim")
    assert [model.sizes[name] for name in names] == [32, 2, 2, 24, 2, 2, 5]
    assert model.sizes["resolution"] // model.sizes["patch_size"] == 3
    labels = torch.zeros(2, dtype=torch.int64)
    assert model.sample(labels, sample_steps=3, cfg_scale=1.5).unique() == 2
    assert sphere_ar.tokens_alone(model).sample(labels, sample_steps=3, cfg_scale=1.5).unique() == 1
    refused(lambda: sphere_ar.sphere_ar(checkout / "nothing", SQUARE), "is not a checkout of SphereAR")
    refused(lambda: sphere_ar.sphere_ar(checkout, PIXEL), "generates states on a square grid")
    (checkout / "SphereAR" / "model.py").write_text("import a_package_that_is_not_there")
    for name in [name for name in sys.modules if name.startswith("SphereAR")]:
        del sys.modules[name]
    refused(lambda: sphere_ar.sphere_ar(checkout, SQUARE), "cannot be used: ModuleNotFoundError")


def test_attention_in_place_of_flash_attention():
    q, k, v = torch.randn(3, 2, 4, 3, 8).unbind()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for causal in (False, True):
        seen = scores.masked_fill(hidden, -torch.inf) if causal else scores
        expected = torch.einsum("bhqk,bkhd->bqhd", seen.softmax(-1), v)
        torch.testing.assert_close(sphere_ar._attention(q, k, v, causal=causal), expected)


def test_what_each_needs():
    points = [
        Point(THEIRS, 2, 9.0), Point(THEIRS, 8, 6.2), Point(THEIRS, 30, 6.0),
        Point("ours, dpm", 3, 5.9), Point("ours, dpm", 6, 4.1), Point("ours, midpoint", 30, 4.0),
    ]  # fmt: skip
    found = needed(points)
    assert (found["theirs, best"], found["theirs, within 5 %"]) == (points[2], points[1])
    assert (found["ours, best"], found["ours, within 5 %"]) == (points[5], points[4])
    assert (found["ours, no worse than theirs"], found["theirs, as it comes"]) == (points[3], points[2])
    assert "ours, no worse than theirs" not in needed([points[2], Point("ours, dpm", 3, 7.0)])


def test_what_is_measured_is_kept(tmp_path, monkeypatch):
    judged = []

    def fid(make, images, judge):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(images)
        return float(len(judged))

    monkeypatch.setattr(peers_quality, "_fid", fid)
    monkeypatch.setattr(peers_quality, "prepare_judge", lambda folder: None)
    monkeypatch.setattr(peers_quality, "Ways", lambda folder, steps: lambda way, evaluations: None)
    monkeypatch.setattr(peers_quality, "TRIED", {"ours, dpm": (3, 4, 5)})
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, 1, 7)
    judged.pop()  # one more, this time
    points, _ = measure(tmp_path, 1, 7)
    assert [(point.evaluations, point.fid) for point in points] == [(3, 1.0), (4, 2.0), (5, 2.0)]
    refused(lambda: measure(tmp_path, 2, 7), "has other settings")


def test_distilled_head_learns_from_our_run(tmp_path):
    images = Ways(tmp_path, 2)(DISTILLED, 1)(3)
    assert (images.shape, read_run(tmp_path / "pra-distilled").initial) == ((3, 1, 8, 8), str(tmp_path / "pra"))


@there
def test_both_learn_the_same_images(tmp_path):
    run = unconditional(2)
    assert (run.model.num_classes, run.train.objective.class_dropout) == (1, 0.0)
    first = train_peer(run, tmp_path / "peer.pt", 2)
    written = (tmp_path / "peer.pt").read_bytes()
    again = train_peer(run, tmp_path / "peer.pt", 4)
    assert (tmp_path / "peer.pt").read_bytes() == written
    assert calls(again)[0] == 2 * calls(first)[0]
    start = torch.nn.utils.parameters_to_vector(flow_model(run.model, 2).parameters())
    trained, read = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (first, again))
    assert torch.equal(trained, read)
    assert not torch.equal(trained, start)
