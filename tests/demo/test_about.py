"""The description of a model, its card, and the models on show."""

import re
import sys
from pathlib import Path

import pytest
import torch
from support.models import CAPTIONED, random_model
from support.refusal import refused

import pra
from pra.config import Fit
from pra.demo.exhibit import describe, load_exhibits
from pra.demo.handlers import html as rendered
from pra.utils.extras import install_command

CPU = torch.device("cpu")


def about(place):
    return describe(load_exhibits([place], CPU)[0])


def titles(html):
    return re.findall("<h4>(.*?)</h4>", html)


def test_run_tells_recipe_curves_and_samples(trained):
    found = about(trained)
    assert (found.facts["Recipe"], found.facts["Weights"]) == ("tiny", "step-00000020")
    assert re.match(r"0\.07 M \(.*backbone", found.facts["Parameters"])
    assert [picture.step for picture in found.shown["Samples over training"]] == [10, 20]
    html = rendered("models", [found])
    assert titles(html) == ["Training curves", "Samples over training"]
    assert "step 20" in html
    early = trained / "checkpoints" / "step-00000010"
    (checkpoint,) = load_exhibits([early], CPU)
    assert checkpoint.run == trained
    assert (describe(checkpoint).facts["Weights"], found.missing) == (early.name, "")


def test_exhibit_takes_the_folder_of_a_frozen_encoder(trained, monkeypatch):
    asked = []
    monkeypatch.setattr("pra.models.condition.ClassCondition.use", lambda _, name: asked.append(name))
    load_exhibits([trained], CPU, encoder=Path("~/encoder"))
    assert asked == [str(Path("~/encoder").expanduser())]


def test_saved_model_tells_of_itself(trained, tmp_path):
    (alone,) = load_exhibits([pra.save(pra.load(trained), tmp_path / "saved")], CPU)
    assert (alone.run, alone.data.fit) == (None, Fit.CENTER_CROP)
    found = describe(alone)
    assert "Recipe" not in found.facts
    assert found.facts["Images"] == "8 x 8, grey, 10 classes"
    html = rendered("models", [found])
    assert "without a model card: its training is unknown." in html
    assert titles(html) == []


def test_shared_model_shows_card_and_pictures(trained, tmp_path, monkeypatch):
    pytest.importorskip("markdown_it", reason="reads the card: pip install 'pra-pixels[demo]'")
    pytest.importorskip("matplotlib", reason="draws the training curves")
    shared = pra.export(trained, tmp_path / "shared", licence="mit")
    html = rendered("models", [about(shared)])
    assert titles(html) == ["Samples", "Training curves", "Model card"]
    assert html.count("<img") == 2
    assert "<li>recipe <code>tiny</code>" in html
    assert "library_name" not in html
    shipped = rendered("models", [about(None)])
    assert shipped.count("<img") == 2
    assert "<h2>Training</h2>" in shipped
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    refused(lambda: rendered("models", [about(shared)]), install_command("demo"), code="not-installed")


def test_nothing_in_a_foreign_card_runs_or_loads(trained, tmp_path):
    pytest.importorskip("markdown_it", reason="reads the card: pip install 'pra-pixels[demo]'")
    model = pra.save(pra.load(trained), tmp_path / "saved")
    (model / "README.md").write_text(
        "---\nlicense: mit\n---\n# Mine\n\n<script>run()</script> <img src='https://elsewhere/a.png'>\n\n"
        "![look](https://elsewhere/b.png) [go](javascript:run()) [there](https://elsewhere/) [file](./figures.json)\n"
    )
    html = rendered("models", [about(model)])
    assert "<h1>Mine</h1>" in html
    assert [word for word in ("license: mit", "<script", "<img") if word in html] == []
    assert "&lt;script&gt;" in html
    assert re.findall(r'href="(.*?)"(.*?)>', html) == [
        ("https://elsewhere/", ' target="_blank" rel="noopener noreferrer"')
    ]
    assert "<a>file</a>" in html


def test_models_side_by_side_have_their_own_names(trained, tmp_path):
    model = random_model(num_classes=2)
    model.classes = ("cat", "dog")
    other = pra.save(model, tmp_path / "pets")
    refused(lambda: load_exhibits([trained, other], CPU), "run and pets", "cat, dog", code="mismatch")
    pairs = [random_model(CAPTIONED, num_classes=count) for count in (1, 2)]
    reader, pet_reader = (pra.save(one, tmp_path / f"reads{one.config.num_classes}") for one in pairs)
    assert [shown.takes_class for shown in load_exhibits([reader, trained], CPU)] == [False, True]
    refused(lambda: load_exhibits([trained, pet_reader], CPU), "different classes", code="mismatch")
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        pra.save(pra.load(trained), folder)
    for places, names in (
        (folders, [str(folder) for folder in folders]),
        ([trained], ["run"]),
        ([None], ["the model that comes with pra"]),
    ):
        assert [shown.name for shown in load_exhibits(places, CPU)] == names
