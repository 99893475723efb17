"""What the documentation's site is made with: the figures, links that leave docs/, names of code in docstrings.

The site itself is built, strictly, by `make docs`.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from support.pages import ROOT, script
from support.refusal import refused

import pra


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    pytest.importorskip("matplotlib", reason="draws the figures")
    return script(ROOT / "examples" / "figures.py")


def test_the_figures_of_a_run(figures: ModuleType, trained: Path, tmp_path: Path) -> None:
    figures.main(trained, tmp_path)
    names = ["method-inputs.png", "method-sampling.png", "method-training.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (ROOT / "docs" / "images" / name).exists()
        with Image.open(tmp_path / name) as picture:
            darkest, brightest = picture.convert("L").getextrema()
            assert picture.width > 1000
            assert (darkest < 50, brightest) == (True, 255)


def test_the_inputs_in_the_figure_are_those_of_training(figures: ModuleType, trained: Path) -> None:
    example = figures.Example(trained)
    _, shown = example.trained_on()
    read = pra.method.rollout.parallel(example.model, example.states, example.t_min, example.keys)
    assert (example.model.patchify(shown)[:, :-1] - read).abs().max() < 1e-5


def test_no_figures_without_states(figures: ModuleType, trained: Path, tmp_path: Path) -> None:
    refused(lambda: figures.main(tmp_path / "nothing", tmp_path), "no run at")
    pixels = tmp_path / "pixels"
    run = pra.config.apply_settings(pra.recipe("tiny:teacher-forced"), ["train.steps=1", "train.sample_every=0"])
    pra.train(run, pixels, device="cpu", progress=False)
    refused(lambda: figures.main(pixels, tmp_path), "has no learned states")
    assert not list(tmp_path.glob("*.png"))


def rendered(page: str, text: str) -> str:
    """The text as the site's hooks leave it."""
    pytest.importorskip("mkdocs", reason="builds the site")
    of = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return str(script(ROOT / "docs" / "hooks.py").on_page_markdown(text, of, None, None))


@pytest.mark.parametrize(
    ("page", "text", "there"),
    [
        ("evidence.md", "[table](../studies/noise/README.md)", "[table](studies/noise/README.md)"),
        ("evidence.md", "![FID](../studies/noise/a.png)", "![FID](studies/noise/a.png)"),
        ("api/a.md", "[table](../../studies/noise/README.md)", "[table](../studies/noise/README.md)"),
        ("evidence.md", "in [studies/](../studies), which", "in studies/, which"),
        ("evidence.md", "[systems](../src/pra/recipes/systems.py)", "[systems][pra.recipes.systems]"),
        ("evidence.md", "[data](../src/pra/data/__init__.py)", "[data][pra.data]"),
        ("evidence.md", "[script](../benchmarks/rollout.py)", "script"),
        ("evidence.md", "[page](method.md) and [one](https://arxiv.org/)", None),
        ("api/a.md", "[page](../method.md)", None),
    ],
)
def test_links_that_leave_the_docs(page: str, text: str, there: str | None) -> None:
    assert rendered(page, text) == (there or text)


def test_quoted_code_is_the_source() -> None:
    for name in ("method.md", "extend.md"):
        page = rendered(name, (ROOT / "docs" / name).read_text())
        quoted = [path.read_text() for path in (ROOT / "examples" / "extend").glob("*.py")]
        if name == "method.md":
            functions = (pra.sampling.generate, pra.sampling.Steps.integrate)
            quoted = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        assert all(text in page for text in quoted)
        assert "<!-- source:" not in page
        assert "<!-- file:" not in page


def test_names_of_code_in_docstrings_become_links() -> None:
    griffe = pytest.importorskip("griffe", reason="reads the docstrings for the site")
    extensions = griffe.load_extensions(script(ROOT / "docs" / "roles.py").Roles())
    config = griffe.load("pra.config", search_paths=[ROOT / "src"], extensions=extensions)
    text = config.docstring.value
    assert '<autoref optional identifier="pra.config.values.override"><code>override</code></autoref>' in text
    assert '<autoref optional identifier="dataclasses.replace"><code>dataclasses.replace</code></autoref>' in text
    assert ":func:" not in text
