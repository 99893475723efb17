"""The model card: of a run, of a model of unknown origin, and the figures that it keeps."""

import json
import re
from pathlib import Path

import pytest
from support.files import contents
from support.models import random_jit, random_model

import pra
from pra.models import weights
from pra.utils.provenance import file_sha256


def report(run, fid, sha256=""):
    """Return what `pra eval` writes, on the weights of a run unless other ones are named."""
    newest = weights.model_folder(run)
    values = {
        "figures": {"adm": {"fid": fid, "sfid": None}},
        "provenance": {
            "features": {"name": "classifier", "sha256": "ab" * 32, "held_out_accuracy": 0.9},
            "reference": {"name": "digits", "count": 1498},
            "images": {
                "weights_sha256": sha256 or file_sha256(newest / weights.weights_name(newest)),
                "sampling": {
                    "guidance": 1.5, "schedule": "constant", "solver": "midpoint", "steps": 2, "temperature": 1.0,
                },
                "labels": "index % 10", "seeds": "0-39", "count": 40,
            },
            "environment": {"versions": {"pra": "0.1.0", "torch": "2.0"}, "hardware": {"device": "abacus"}},
        },
    }  # fmt: skip
    return json.dumps(values)


def card_of(model, folder, **options):
    if not isinstance(model, Path):
        model = pra.save(model, folder / "saved")
    return (pra.export(model, folder / "model", **options) / "README.md").read_text()


def test_card_says_what_the_run_knows(run, tmp_path):
    (run / "figures.json").write_text(report(run, 12.345))
    (run / "README.md").write_text("Mine alone.")  # notes, and not a card
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = "folder:/home/alice/secret/cats"
    (run / "config.json").write_text(json.dumps(config))
    card = card_of(run, tmp_path, licence="apache-2.0", repo="alice/tiny")
    matter = pytest.importorskip("yaml", reason="comes with the extra hub").safe_load(card.split("---")[1])
    tags = matter.pop("tags")
    assert matter == {
        "license": "apache-2.0", "library_name": "pra", "pipeline_tag": "unconditional-image-generation",
    }  # fmt: skip
    assert {"image-generation", "pixel-space", "class-conditional-image-generation"} <= set(tags)
    commit = json.loads((run / "environment.json").read_text())["commit"]
    for told in (
        "# tiny", 'pra.load("hub:alice/tiny")', "pra sample hub:alice/tiny --labels all --seeds 0-7",
        "guidance 1.5 (constant), 2 midpoint steps per patch", "recipe `tiny`", "data: `folder:cats`",
        "- 20 steps of 8 images", "12.345", "accuracy 0.9 on held-out images",
        "40 images: labels index % 10, seeds 0-39", "on abacus", "[figures.json](./figures.json)", "`apache-2.0`",
        f"commit `{commit}`", "![Samples](./samples.png)", "![Training curves](./curves.png)",
    ):  # fmt: skip
        assert told in card
    assert "secret" not in card
    assert "Mine alone." not in card
    assert "\n\n\n" not in card
    for picture in re.findall(r"\]\(\./(.*?)\)", card):
        assert (tmp_path / "model" / picture).exists()


def test_card_of_unknown_origin_invents_nothing(tmp_path):
    model = random_model(num_classes=1)
    model.classes = ("cat",)
    card = card_of(model, tmp_path)
    assert [word for word in ("license", "class-conditional", "## Training", "None,") if word in card] == []
    assert "The author of these weights states none." in card
    assert "None: nobody has run `pra eval` on these weights." in card
    assert "- classes: cat" in card


def test_card_names_some_of_many_classes(trained, tmp_path):
    model = random_model(num_classes=1000)
    model.classes = ("caf\udce9\n# Title", *(f"class {number}" for number in range(1, 1000)))
    for folder, told, options in (
        (
            model,
            (
                "--labels 0-9 --seeds 0-7",
                "- classes: caf\\udce9 # Title, class 1,",
                "class 29 and 970 more",
            ),
            {},
        ),
        (random_jit(), ("steps per image", "cannot complete an image"), {}),
        (
            trained / "checkpoints" / "step-00000010",
            ("- 10 steps of 8 images", "the weights are those of the last step"),
            {"average": "raw"},
        ),
    ):
        card = card_of(folder, tmp_path / type(folder).__name__, **options)
        assert [words for words in told if words not in card] == []


# --- reports ------------------------------------------------------------------------------------------------


def test_figures_of_other_weights_are_left_out(run, tmp_path):
    (run / "old.json").write_text(report(run, 77.7, sha256="0" * 64))
    (run / "notes.json").write_text('{"figures": 3}')
    (run / "figures.json").write_text(report(run, 12.345))
    with pytest.warns(UserWarning, match=r"old\.json is left out: its figures are of other weights"):
        first = pra.export(run, tmp_path / "first", half=True)  # whose hash is not that of the weights measured
    assert not {"old.json", "notes.json"} & set(contents(first))
    assert "77.7" not in (first / "README.md").read_text()
    with (first / "README.md").open("a") as card:
        card.write("\nMine.\n")
    second = pra.export(first, tmp_path / "second")
    assert contents(first) == contents(second)
    assert "figures.json" in contents(second)  # the card names it
    (first / "other.json").write_text(report(run, 77.7))
    with pytest.warns(UserWarning, match=r"other\.json is left out: its figures are of other weights"):
        assert "other.json" not in contents(pra.export(first, tmp_path / "third"))
