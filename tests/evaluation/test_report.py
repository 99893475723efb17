"""Run reports: the content of the self-contained page, its notes on missing parts, and the command."""

import json
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.answer import caller
from support.files import contents as files_in
from support.refusal import refused

import pra
from pra.config import Exact, Noised, Parallel, apply_settings, override, to_dict
from pra.data import load_images, open_source
from pra.evaluation import report as content
from pra.evaluation import rollout_gap as gap
from pra.evaluation.report import evaluation, in_words, rollout_in_words, write_report
from pra.evaluation.rollout_gap import rollout_gap
from pra.evaluation.samples import spread
from pra.training import callbacks
from pra.utils.pixels import from_uint8

pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")


class Page(HTMLParser):
    """A parsed HTML page: its tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.words = []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def count(self, tag, **attributes):
        return sum(name == tag and attributes.items() <= has.items() for name, has in self.tags)


@pytest.fixture
def call(capsys):
    return caller(capsys)


def bare(folder, recipe="tiny"):
    """Make the folder of a run that has not begun, and return it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(pra.recipe(recipe))))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Replace FLOP counts and plots, which take a second, except in the test that checks them."""
    if "loads_nothing" not in request.node.name:
        monkeypatch.setattr(content, "costs", lambda config: ([("total", "0.074 M")], []))
        monkeypatch.setattr(content, "gap_curves", lambda gap, columns: content.Picture("data:image/webp", 1, 1))


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_shows_the_run_and_loads_nothing(run):
    measured = dict.fromkeys(gap.CURVES, [1.0] * 16) | {"checkpoint": "step-00000020", "images": 8, "seed": 0}
    sampling = to_dict(pra.recipe("tiny").sampling)
    (run / gap.FILE).write_text(json.dumps(measured | {"inputs": [0.5] * 15, "sampling": sampling, "environment": {}}))
    page = Page(write_report(run))
    links = [has[name] or "" for _, has in page.tags for name in ("src", "href") if name in has]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert page.count("link") == 0
    assert page.count("img") == 6  # samples and reconstructions at steps 10 and 20, curves of two kinds
    assert page.count("input", type="range", max="1") == 2
    assert page.count("img", **{"class": "drawn"}) == 2
    assert content.gap_curves(gap.read_gap(run), 4).width == 1320
    assert "url(" not in page.text
    assert "import" not in page.text
    for words in ("0.074 M", "20 steps of 20", "160 images seen", "16 (4 x 4) of 2 x 2 pixels", "step-00000020"):
        assert words in page.text
    assert '"codec_warmup": 0' in page.text
    assert f"torch {torch.__version__}" in page.text


def test_name_that_is_not_utf8_is_written_escaped(trained, tmp_path):
    (tmp_path / "r\udce9un").symlink_to(trained)
    page = write_report(tmp_path / "r\udce9un", tmp_path / "page.html")
    assert "r\\udce9un" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("system", ["", ":jit", ":teacher-forced"])
def test_report_missing_parts_are_noted_with_commands(tmp_path, system):
    run = bare(tmp_path / "run", f"tiny{system}")
    page = Page(write_report(run))
    assert (page.count("img"), page.count("input")) == (0, 0)
    assert page.text.count("None yet") == (3 if system else 4)
    assert f"pra eval {run} --out {run}/figures.json" in page.text
    assert "0 steps logged, of 20" in page.text
    assert ("it has no states to reconstruct from" in page.text) == bool(system)
    assert ("JiT makes all patches at once: there is no rollout" in page.text) == (system == ":jit")
    assert (f"pra report {run} does" in page.text) == (system != ":jit")
    line = {"step": 10, "epoch": 1.0, "images_per_second": 9.0, "flow": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "they need two lines of metrics.jsonl" in Page(write_report(run)).text


def test_report_outdated_curves_are_redrawn(run, monkeypatch):
    config = pra.recipe("tiny")
    there = content.curves(run, config)
    assert there == content.embedded(run / "curves.png")
    (run / "curves.png").write_bytes(b"older")
    os.utime(run / "curves.png", (0, 0))
    assert content.curves(run, config) == there
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "this needs matplotlib, from the extra train" in Page(write_report(run)).text


def test_report_text_from_files_is_escaped(run):
    wild = "<script>alert(1)</script><b>&amp;"
    values = to_dict(pra.recipe("tiny"))
    values["recipe"] = values["data"]["source"] = wild + "\udce9"  # a folder's name that is not UTF-8
    (run / "config.json").write_text(json.dumps(values))
    figures = {"figures": {wild: {wild: 1.0}}, "provenance": {"features": {"name": wild}}}
    (run / "figures.json").write_text(json.dumps(figures))
    other = run.rename(run.with_name("<i>run"))
    page = Page(write_report(other))
    assert (page.count("script"), page.count("b"), page.count("i")) == (1, 4, 0)  # the page's own
    assert page.text.count(wild) >= 4


def test_many_grids_are_thinned_and_copies_skipped(tmp_path):
    run = bare(tmp_path / "run")
    (run / "samples").mkdir()
    for step in range(1, 31):
        Image.new("L", (4, 4)).save(run / "samples" / f"step-{step:08d}.png")
    for name in ("step-00000010 2.png", "step-last.png"):
        (run / "samples" / name).write_bytes(b"a copy, say")
    page = Page(write_report(run))
    steps = [int(has["alt"].rpartition(" ")[2]) for tag, has in page.tags if tag == "img" and has["alt"]]
    assert (len(steps), steps[0], steps[-1]) == (12, 1, 30)
    assert steps == sorted(set(steps))
    assert "12 of 30 grids; all are in samples/" in page.text
    (run / "report.html").unlink()
    (run / "samples" / "step-00000030.png").write_bytes(b"nonsense")
    refused(lambda: write_report(run), code="unreadable", path=run / "samples" / "step-00000030.png")
    assert not (run / "report.html").exists()


def test_figures_are_shown_with_their_origin(run):
    origin = {
        "features": {"name": "classifier", "sha256": "12ab"},
        "reference": {"name": "digits"},
        "count": 40,
        "images": {"model": "runs/x/checkpoints/step-00000010", "weights": "ema.safetensors"},
        "environment": {"command": ["/usr/bin/pra", "eval", "runs/x", "--num", "40"], "commit": "e60c51a"},
    }
    figures = {"adm": {"fid": 28.33205, "sfid": None}, "torch-fidelity": {"fid": 28.74}}
    (run / "figures.json").write_text(json.dumps({"figures": figures, "provenance": origin}))
    text = Page(write_report(run)).text
    for words in (
        "28.332 FID of 40 images, features classifier, adm",
        "fid 28.332 28.74 sfid - -",
        "pra eval runs/x --num 40",
        "made by step-00000010 (the run has since reached step-00000020) weights ema",
        '"sha256": "12ab"',
    ):
        assert words in text


def test_a_rollout_in_words():
    assert "t between 0.9 and 1" in rollout_in_words(Parallel(t_min=0.9))
    assert "deviation 0.25" in rollout_in_words(Noised(sigma=0.25))
    assert "4 solver steps" in rollout_in_words(Exact())
    assert "teacher forcing" in in_words(pra.recipe("tiny:teacher-forced"))["Inputs in training"]
    assert "Inputs in training" not in in_words(pra.recipe("tiny:jit"))


# --- the command --------------------------------------------------------------------------------------------


def test_report_gap_of_the_model_is_measured_once(run, tmp_path, call, monkeypatch):
    config, source = override(pra.recipe("tiny"), "sampling.steps", "2"), open_source("digits")
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    before = files_in(run)
    assert call("report", run, "--gap-images", 4, "--out", tmp_path / "page.html").code == 0
    assert files_in(run) == before
    assert Page(tmp_path / "page.html").count("img", **{"class": "drawn"}) == 2
    assert call("report", run, "--gap-images", 8, "--device", "cpu")[:2] == (0, f"report: {run}/report.html\n")
    page = Page(run / "report.html")
    assert page.count("img", **{"class": "drawn"}) == 2
    assert "8 training images and as many samples" in page.text
    pixels, labels = load_images(source, spread(len(source), 8), (8, 8), 1, config.data)
    wanted = rollout_gap(
        pra.load(run), config.train.rollout, from_uint8(pixels), labels, config.sampling, config.train.objective
    )
    found = gap.read_gap(run)
    assert found is not None
    assert found["conditions"] == pytest.approx(wanted.conditions.tolist())
    assert found["rollout_loss"] == pytest.approx(wanted.rollout_loss.tolist())

    monkeypatch.setattr(gap, "rollout_gap", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(gap, "open_source", lambda _: pytest.fail("opened again"))
    assert call("report", run, "--gap-images", 8).code == call("report", run, "--gap-images", 0).code == 0
    assert Page(run / "report.html").count("img", **{"class": "drawn"}) == 2
    (run / "checkpoints" / "step-00000020").rename(run / "checkpoints" / "step-00000030")
    assert "step-00000020 (the run has trained since" in Page(write_report(run)).text
    (run / "rollout-gap.json").write_text(json.dumps(found | {"inputs": 1}))
    refused(lambda: write_report(run), code="unreadable", path=run / "rollout-gap.json")


def test_report_gap_over_a_small_source_is_kept(run, tmp_path, call, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        Image.new("L", (8, 8), 40 * number).save(pictures / f"{number}.png")
    config = apply_settings(pra.recipe("tiny"), [f"data.source=folder:{pictures}", "sampling.steps=2"])
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    assert call("report", run).code == 0
    measured = gap.read_gap(run)
    assert measured is not None
    assert measured["images"] == 6
    assert gap.known_gap(run, config, 200) == gap.known_gap(run, config, 6) == measured
    assert gap.known_gap(run, config, 4) is None
    monkeypatch.setattr(gap, "rollout_gap", lambda *_: pytest.fail("measured again"))
    assert call("report", run).code == 0
    Image.new("L", (8, 8)).save(pictures / "one more.png")
    assert gap.known_gap(run, config, 200) is None
    (run / "rollout-gap.json").unlink()
    pictures.rename(tmp_path / "elsewhere")
    assert call("report", run).code == 0
    assert f"It could not be measured: data source 'folder:{pictures}'" in Page(run / "report.html").text


def test_bad_input_is_refused_in_a_line(run, call, monkeypatch):
    monkeypatch.chdir(run.parent)
    Path("there.html").write_text("mine")
    before = files_in(run.parent)
    assert call("report", "nowhere").is_refusal("nowhere")
    for options, said in (
        (("--gap-images", 1), "--gap-images 1"),
        (("--gap-images", -5), "--gap-images -5"),
        (("--out", "page.png"), "page.png"),
        (("--out", "there.html/page.html"), "there.html"),
        (("--out", "there.html"), "there.html"),
    ):
        assert call("report", run, *options).is_refusal(said)
    assert files_in(run.parent) == before


GAP = {"checkpoint": "step-00000020", "images": 4, "seed": 0, "sampling": {"solver": "midpoint", "steps": 2}}
GAP |= {"inputs": [0.1], "conditions": [0.1, 0.2], "training_loss": [1.0, 0.0], "rollout_loss": [math.nan, 1.0]}
GAP |= {"environment": {}}


def test_damaged_gap_is_refused_in_a_line(run, call):
    path = run / "rollout-gap.json"
    path.write_text(json.dumps(GAP))  # a loss may be nan
    assert call("report", run, "--gap-images", 0).code == 0
    for change in (
        {"checkpoint": 5}, {"images": "x"}, {"sampling": 3}, {"sampling": {}}, {"inputs": []}, {"inputs": [10**400]},
        {"rollout_loss": [1.0]}, {"training_loss": "x"}, {"seed": None},
    ):  # fmt: skip
        path.write_text(json.dumps(GAP | change))
        assert call("report", run, "--gap-images", 0).is_refusal(str(path), "remove it")


def test_strange_figures_and_pictures_are_shown_or_refused(run, call):
    strange = {"fid": "x", "kid": [1], "sfid": 10**400, "precision": None, "recall": 0.5}
    (run / "figures.json").write_text(json.dumps({"figures": {"adm": strange}, "provenance": {"images": 5}}))
    assert call("report", run, "--gap-images", 0).code == 0
    assert evaluation(run / "figures.json").figures["adm"] == dict.fromkeys(strange) | {"recall": 0.5}
    (run / "samples" / "step-00000030.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")  # Pillow must not start Ghostscript
    assert call("report", run, "--gap-images", 0).is_refusal("step-00000030.png")
    (run / "samples" / "step-00000030.png").unlink()
    os.mkfifo(run / "samples" / "step-00000030.png")
    assert call("report", run, "--gap-images", 0).is_refusal("step-00000030.png", "not a regular file")


@pytest.mark.filterwarnings("default:no report")
def test_training_ends_with_a_page(tmp_path, call, monkeypatch):
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)
    monkeypatch.setattr(content, "curves", lambda run, config: None)
    folder = tmp_path / "run"
    command = ("train", "tiny", "--device", "cpu", "--run-dir", folder, "--set", "train.sample_every=0", "--steps")
    answer = call(*command, "2")
    assert (answer.code, f"report: {folder}/report.html" in answer.out) == (0, True)
    assert "2 steps of 2" in Page(folder / "report.html").text
    (folder / "figures.json").write_text("[")
    answer = call(*command, "3")
    assert answer.code == 0  # training itself succeeded
    assert any("pra: warning: no report: " in line for line in answer.errors)
