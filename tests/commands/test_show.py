"""``pra show``."""

import json
import re
from pathlib import Path

import pytest
import torch

import pra
from pra.config import to_dict
from pra.models import build_model


def test_show_without_name_lists_recipes(call):
    code, text, _ = call("show")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == list(pra.RECIPES)
    assert all(len(line.split()) > 3 for line in text.splitlines())


@pytest.mark.parametrize("name", ["tiny:jit", "tiny", pytest.param("pra-s-256", marks=pytest.mark.slow)])
def test_show_json_adds_up(name, call):
    Path("tiny").mkdir()  # a folder of a recipe's name does not hide it
    report = json.loads(call("show", name, "--json").out)
    assert report["config"] == json.loads(json.dumps(to_dict(pra.recipe(name))))
    parameters, sampling = report["parameters"], report["flops_per_image"]["sampling"]
    assert name == "tiny:jit" or {"backbone", "head", "codec"} <= parameters.keys()
    with torch.device("meta"):
        assert parameters["total"] == sum(p.numel() for p in build_model(pra.recipe(name).model).parameters())
    for counts in (parameters, sampling):
        assert counts["total"] == sum(count for part, count in counts.items() if part != "total") > 0
    assert report["flops_per_image"]["training"] > 0


def test_show_of_a_run_is_its_configuration(call, trained):
    config = json.loads((trained / "config.json").read_text())
    assert json.loads(call("show", trained, "--json").out)["config"] == config


def test_show_prints_a_setting_a_line(call):
    lines = r" +image_size +8 x 8", r" +total +0\.\d+ M", r" +sampling total +0\.0*[1-9]\d*"
    for name in ("tiny:states", "tiny:jit"):
        text = call("show", name).out
        for line in (rf"recipe +{name}", *lines):
            assert re.search(rf"^{line}$", text, re.MULTILINE)


def test_show_of_no_run_is_refused(call, trained, tmp_path):
    assert call("show", "tinny").is_refusal("no run at tinny", "did you mean 'tiny'?")
    assert call("show", tmp_path).is_refusal(tmp_path, "config.json")
    saved = pra.save(pra.load(trained), tmp_path / "saved")
    assert call("show", saved).is_refusal(saved, "a model")
    (tmp_path / "config.json").write_text('{"recipe": ')
    assert call("show", tmp_path).is_refusal("config.json", "JSON")
