"""Figures, links, quoted code and the layout in the docs. `make docs` builds the site in strict mode."""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
from PIL import Image
from support.pages import ROOT, script
from support.refusal import refused
from support.training import tiny, train

import pra


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("matplotlib", reason="draws the figures")
    return script(ROOT / "examples" / "figures.py")


def test_figures_of_a_run_show_the_inputs_of_training(figures, trained, tmp_path):
    figures.main(trained, tmp_path)
    names = ["method-inputs.png", "method-sampling.png", "method-training.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (ROOT / "docs" / "images" / name).exists()
        with Image.open(tmp_path / name) as picture:
            darkest, brightest = picture.convert("L").getextrema()
            assert picture.width > 1000
            assert (darkest < 50, brightest) == (True, 255)
    example = figures.Example(trained)
    _, shown = example.trained_on()
    read = pra.method.rollout.parallel(example.model, example.states, example.t_min, example.keys)
    assert (example.model.patchify(shown)[:, :-1] - read).abs().max() < 1e-5


def test_figures_without_states_are_refused(figures, tmp_path):
    refused(lambda: figures.main(tmp_path / "nothing", tmp_path), "no run at")
    train(tiny("train.steps=1", recipe="tiny:teacher-forced"), tmp_path / "pixels")
    refused(lambda: figures.main(tmp_path / "pixels", tmp_path), "has no learned states")
    assert not list(tmp_path.glob("*.png"))


def rendered(page, text):
    """Return the text as the site's hooks rewrite it."""
    pytest.importorskip("mkdocs", reason="builds the site")
    of = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return str(script(ROOT / "docs" / "hooks.py").on_page_markdown(text, of, None, None))


def test_links_that_leave_the_docs_are_rewritten():
    for page, text, there in (
        ("evidence.md", "[table](../studies/noise/README.md)", "[table](studies/noise/README.md)"),
        ("evidence.md", "![FID](../studies/noise/a.png)", "![FID](studies/noise/a.png)"),
        ("api/a.md", "[table](../../studies/noise/README.md)", "[table](../studies/noise/README.md)"),
        ("evidence.md", "in [studies/](../studies), which", "in studies/, which"),
        ("evidence.md", "[systems](../src/pra/recipes/systems.py)", "[systems][pra.recipes.systems]"),
        ("evidence.md", "[data](../src/pra/data/__init__.py)", "[data][pra.data]"),
        ("evidence.md", "[script](../benchmarks/rollout.py)", "script"),
        ("evidence.md", "[page](method.md) and [one](https://arxiv.org/)", None),
        ("api/a.md", "[page](../method.md)", None),
    ):
        assert rendered(page, text) == (there or text)


def test_quoted_code_is_the_source():
    functions = (pra.sampling.generate, pra.sampling.Steps.integrate)
    for name, quoted in (
        ("method.md", [textwrap.dedent(inspect.getsource(function)) for function in functions]),
        ("extend.md", [path.read_text() for path in (ROOT / "examples" / "extend").glob("*.py")]),
    ):
        page = rendered(name, (ROOT / "docs" / name).read_text())
        assert all(text in page for text in quoted)
        assert "<!-- source:" not in page
        assert "<!-- file:" not in page


def test_names_of_code_in_docstrings_become_links():
    griffe = pytest.importorskip("griffe", reason="reads the docstrings for the site")
    extensions = griffe.load_extensions(script(ROOT / "docs" / "roles.py").Roles())
    config = griffe.load("pra.config", search_paths=[ROOT / "src"], extensions=extensions)
    text = config.docstring.value
    assert '<autoref optional identifier="pra.config.values.override"><code>override</code></autoref>' in text
    assert '<autoref optional identifier="dataclasses.replace"><code>dataclasses.replace</code></autoref>' in text
    assert ":func:" not in text


def test_layout_names_every_room_and_no_import_goes_up(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the layout")
    layout = script(ROOT / "docs" / "layout.py")
    inside = {path.stem for path in layout.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert inside - {"__init__", "__main__"} == set(layout.ROOMS)
    found = layout.imports()
    assert found["sampling"] >= {"models", "method"}  # the imports were parsed
    assert layout.upwards(found) == []
    assert layout.upwards({"models": {"config", "training"}}) == [("models", "training")]
    layout.draw(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").stat().st_size > 10_000
