"""The web demo without its web framework: what is asked for, generated, uploaded, told and drawn."""

from __future__ import annotations

import base64
import builtins
import io
import os
import re
import signal
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from support.browser import free_port
from support.models import LEARNED, random_jit, random_model
from support.refusal import refused

import pra
from pra import cli
from pra.commands import demo as command
from pra.commands.demo import check_address
from pra.config import DataConfig, Fit, SamplingConfig, Solver
from pra.demo import handlers, markup, page
from pra.demo.about import describe
from pra.demo.exhibit import Exhibit, load_exhibits
from pra.demo.generation import (
    EVERY_CLASS,
    LAST_SEED,
    MOST_PICTURES,
    OWN_STEPS,
    Request,
    answer,
    keep_rows,
    sampling_of,
)
from pra.demo.handlers import MOST_KEPT, Handlers, Turn
from pra.demo.upload import MOST_PIXELS, fit_upload, read_upload
from pra.models import Model, weights
from pra.sampling import Engine
from pra.utils.extras import install_command
from pra.utils.pixels import to_uint8

CPU = torch.device("cpu")


def exhibit(model: Model, name: str = "one", fit: Fit = Fit.CENTER_CROP) -> Exhibit:
    config = replace(pra.recipe("tiny"), data=DataConfig(source="digits", fit=fit))
    return Exhibit(name, Path(name), None, config, model)


def asked(**changes: Any) -> Request:
    return Request(**{"label": 1, "seed": 5, "count": 3, "guidance": 1.5, "steps": 2, **changes})


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"label": None}, ("no class is chosen",)),
        ({"seed": None}, ("the seed is empty", f"0 to {LAST_SEED}")),
        ({"seed": -1}, ("the seed", "got -1")),
        ({"seed": LAST_SEED + 1}, ("the seed", str(LAST_SEED), f"got {LAST_SEED + 1}")),
        ({"seed": 0.5}, ("the seed must be a whole number, got 0.5",)),
        ({"count": 0}, ("number of pictures", "between 1 and 16", "got 0")),
        ({"count": MOST_PICTURES + 1}, ("number of pictures", "got 17")),
        ({"guidance": float("nan")}, ("guidance",)),
        ({"guidance": 11}, ("guidance", "between 0 and 10", "got 11")),
        ({"steps": 101}, ("number of steps", "between 0 and 100", "got 101")),
        ({"steps": -1}, ("number of steps", "got -1")),
        ({"steps": None}, ("number of steps is empty",)),
    ],
)
def test_requests_beyond_the_limits(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    refused(lambda: asked(**change), *parts)


def test_each_class_in_turn() -> None:
    request = asked(label=EVERY_CLASS, count=7)
    assert request.labels(5) == [0, 1, 2, 3, 4, 0, 1]
    assert request.seeds() == [5, 6, 7, 8, 9, 10, 11]


# --- what is generated --------------------------------------------------------------------------------------


def test_rows_appear_one_after_another_and_end_as_the_sampler_does() -> None:
    model = random_model()
    parts = [sheets[0] for sheets in answer([exhibit(model)], asked())]
    assert [part.pictures.shape[2] for part in parts] == [0, 2, 4, 6]
    assert [part.finished for part in parts] == [False, False, False, True]
    expected = pra.Sampler(model, replace(model.sampling, guidance=1.5, steps=2)).sample([1] * 3, [5, 6, 7])
    torch.testing.assert_close(parts[-1].pictures, expected)
    for part in parts:
        torch.testing.assert_close(part.pictures, expected[:, :, : part.pictures.shape[2]])
    assert parts[0].captions == ("1, seed 5", "1, seed 6", "1, seed 7")


def test_two_models_take_turns_with_the_same_labels_and_seeds() -> None:
    small, tall = random_model(), random_model(image_size=(10, 8))
    steps = list(answer([exhibit(small), exhibit(tall, "two")], asked(label=EVERY_CLASS)))
    assert [tuple(sheet.pictures.shape[2] for sheet in sheets) for sheets in steps] == [
        (0, 0), (2, 2), (4, 4), (6, 6), (6, 8), (6, 10),
    ]  # fmt: skip
    first, second = steps[-1]
    assert first.captions == second.captions
    assert first.name != second.name


def test_each_model_takes_its_own_steps_until_others_are_asked_for() -> None:
    learnt, distilled = random_model(), random_model(head=replace(LEARNED.head, shortcut=True))
    learnt.sampling = SamplingConfig(steps=3, times=(0.0, 0.2, 0.7, 1.0))
    distilled.sampling = SamplingConfig(solver=Solver.SHORTCUT, steps=4)
    shown = [exhibit(learnt), exhibit(distilled, "two")]

    def taken(steps: int) -> list[tuple[int, bool]]:
        settings = [sampling_of(one.model, asked(steps=steps)) for one in shown]
        return [(one.steps, one.times is None) for one in settings]

    assert taken(OWN_STEPS) == [(3, False), (4, True)]
    assert taken(3)[0] == (3, False)
    assert taken(4) == [(4, True), (4, True)]
    assert [taken(steps)[1][0] for steps in (1, 2, 5, 7, 100)] == [1, 2, 4, 8, 8]
    for steps, note in ((OWN_STEPS, ""), (4, ""), (10, "8 steps in place of 10: this model takes 1, 2, 4, 8")):
        *_, sheets = answer(shown, asked(steps=steps, count=1))
        assert [sheet.error for sheet in sheets] == ["", ""]
        assert [sheet.note for sheet in sheets] == ["", note]
        assert note in markup.show_sheets(sheets)


def test_visitors_share_engines_and_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A press with the same settings finds the engine there; two at once have one each, and their own pictures."""
    made: list[int] = []
    monkeypatch.setattr("pra.sampling.sampler.Engine", lambda *a: (made.append(a[2]), Engine(*a))[1])
    shown = [exhibit(random_model())]
    (*_, (first,)), (*_, (again,)) = answer(shown, asked()), answer(shown, asked())
    assert made == [3]
    assert torch.equal(first.pictures, again.pictures)
    both = zip(answer(shown, asked()), answer(shown, asked(seed=9)), strict=True)
    *_, ((one,), (other,)) = both
    assert made == [3, 3]
    assert torch.equal(one.pictures, first.pictures)
    assert not torch.equal(other.pictures, first.pictures)
    wanted = [asked(seed=seed, guidance=scale) for seed in (5, 9) for scale in (1.0, 1.5, 2.0)]
    alone = [list(answer(shown, request))[-1][0].pictures for request in wanted]
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(lambda request: list(answer(shown, request))[-1][0].pictures, wanted * 3))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 3, strict=True))


def test_one_model_fails_and_the_other_goes_on() -> None:
    jit, model = random_jit(), random_model()
    keep = [torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)]
    *_, (failed, whole) = answer([exhibit(jit, "jit"), exhibit(model)], asked(), keep)
    assert "JiT cannot complete" in failed.error
    assert not failed.finished
    assert whole.finished
    assert not whole.error


def test_no_memory_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Iterator[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        yield

    monkeypatch.setattr(pra.Sampler, "stream", full)
    *_, (sheet,) = answer([exhibit(random_model())], asked())
    assert sheet.error == "no memory for 3 pictures at once on this device; ask for fewer"


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.5, 2), (1 / 3, 1), (1.0, 3), (7.0, 3), (-1.0, 0)])
def test_completions_keep_the_rows_exactly(share: float, rows: int) -> None:
    picture = torch.rand(3, 6, 8) * 2 - 1
    keep = keep_rows(picture, LEARNED, share)
    assert keep.shape == (3, 2 * rows, 8)
    parts = [sheets[0] for sheets in answer([exhibit(random_model())], asked(), [keep])]
    assert [part.pictures.shape[2] for part in parts] == list(range(2 * rows, 7, 2))
    assert torch.equal(parts[-1].pictures[:, :, : 2 * rows], keep.expand(3, *keep.shape))
    assert {part.kept for part in parts} == {2 * rows}


# --- what is uploaded ---------------------------------------------------------------------------------------


def saved(path: Path, size: tuple[int, int], mode: str = "RGB", **options: Any) -> Path:
    Image.linear_gradient("L").resize(size).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "size", "mode", "told"),
    [
        ("exact.png", (8, 6), "RGB", "taken as it is"),
        ("photo.jpg", (400, 300), "RGB", "scaled to 8x6"),
        ("wide.webp", (400, 100), "RGB", "scaled, and the middle 8x6 cut out"),
        ("small.png", (4, 3), "L", "taken as colour, enlarged to 8x6"),
        ("palette.gif", (80, 60), "P", "scaled to 8x6"),
        ("print.tif", (80, 60), "CMYK", "scaled to 8x6"),
        ("bits.bmp", (80, 60), "1", "taken as colour, scaled to 8x6"),
        ("clear.png", (80, 60), "RGBA", "put on white, scaled to 8x6"),
    ],
)
def test_any_format_and_size_is_fitted_and_told(
    tmp_path: Path, name: str, size: tuple[int, int], mode: str, told: str
) -> None:
    upload = read_upload(saved(tmp_path / name, size, mode))
    pixels, line = fit_upload(upload, LEARNED, exhibit(random_model()).data)
    assert pixels.shape == (3, 6, 8)
    assert pixels.abs().max() <= 1
    assert line == f"{name} ({size[0]}x{size[1]}): {told}"


def test_an_upload_for_a_grey_model_that_pads(tmp_path: Path) -> None:
    shown = exhibit(random_model(channels=1, image_size=(8, 8)), fit=Fit.PAD)
    pixels, line = fit_upload(read_upload(saved(tmp_path / "a.png", (6, 4))), shown.model.config, shown.data)
    assert line == "a.png (6x4): turned grey, padded with black to 8x8"
    assert torch.equal(to_uint8(pixels)[0, :2], torch.zeros(2, 8, dtype=torch.uint8))
    _, line = fit_upload(read_upload(saved(tmp_path / "b.png", (9, 9))), shown.model.config, shown.data)
    assert line == "b.png (9x9): turned grey, scaled to 8x8"


def test_an_upload_is_turned_upright_and_stills_are_taken_of_animations(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upload = read_upload(saved(tmp_path / "turned.jpg", (40, 20), exif=exif))
    assert upload.picture.size == (20, 40)
    assert upload.done == ("turned upright",)
    frames = [Image.new("L", (8, 6), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_upload(tmp_path / "moving.gif").done == ("first picture of an animation",)


def test_uploads_that_are_no_pictures(tmp_path: Path) -> None:
    text = tmp_path / "letter.jpg"
    text.write_text("Dear all")
    refused(lambda: read_upload(text), "letter.jpg: not an image in any format", "give another picture: JPEG, PNG")
    cut = tmp_path / "cut.png"
    cut.write_bytes(saved(tmp_path / "whole.png", (300, 300)).read_bytes()[:-400])
    refused(lambda: read_upload(cut), "cut.png: cannot be decoded (")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(lambda: read_upload(tmp_path / "empty.png"), "empty.png: not an image")


def test_of_pillow_s_formats_the_usual_ones_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = saved(tmp_path / "drawing.png", (8, 6))
    with Image.open(picture) as drawing:
        drawing.save(tmp_path / "drawing.eps")
        drawing.save(tmp_path / "drawing.ico")
    (tmp_path / "drawing.eps").rename(tmp_path / "eps.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("a program is started"))
    for name in ("eps.png", "drawing.ico"):
        refused(
            lambda name=name: read_upload(tmp_path / name), f"{name}: not an image in any format that is taken here"
        )
    Image.new("F", (8, 6)).save(tmp_path / "float.tif")
    with pytest.raises(pra.PraError, match=r"float\.tif: floating-point pixels .*; give another picture") as raised:
        fit_upload(read_upload(tmp_path / "float.tif"), LEARNED, exhibit(random_model()).data)
    assert "on_corrupt" not in str(raised.value)


def test_the_frames_of_an_animation_are_not_walked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("L", (8, 6), grey) for grey in range(9)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    real, sought = GifImageFile._seek, []

    def seek(self: GifImageFile, frame: int, update_image: bool = True) -> None:
        sought.append(frame)
        real(self, frame, update_image)

    monkeypatch.setattr(GifImageFile, "_seek", seek)
    assert read_upload(tmp_path / "moving.gif").done == ("first picture of an animation",)
    assert max(sought) == 1


def test_uploads_beyond_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: read_upload(saved(tmp_path / "thread.png", (210, 10), "1")), "thread.png has 210x10", "cut out")
    side = int(MOST_PIXELS**0.5) + 1
    path = tmp_path / "large.png"
    Image.new("1", (side, side)).save(path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("its pixels are read"))
    refused(lambda: read_upload(path), f"large.png has {side}x{side} pixels, more than 64 million", "smaller")


# --- what a model is ----------------------------------------------------------------------------------------


def test_a_run_tells_what_it_is(trained: Path) -> None:
    (shown,) = load_exhibits([trained], CPU)
    about = describe(shown)
    assert about.facts["Recipe"] == "tiny"
    assert "0.07 M" in about.facts["Parameters"] or "backbone" in about.facts["Parameters"]
    assert about.facts["Weights"] == "step-00000020"
    assert [picture.step for picture in about.samples] == [10, 20]
    assert about.curves
    html = markup.show_models([about])
    assert html.count("<polyline") == len(about.curves)
    assert "step 20" in html


def test_a_checkpoint_tells_of_its_run_and_a_saved_model_of_itself(trained: Path, tmp_path: Path) -> None:
    early = trained / "checkpoints" / "step-00000010"
    saved_model = pra.save(pra.load(trained), tmp_path / "saved")
    (checkpoint,), (alone,) = load_exhibits([early], CPU), load_exhibits([saved_model], CPU)
    assert checkpoint.run == trained
    assert describe(checkpoint).facts["Weights"] == "step-00000010"
    about = describe(alone)
    assert alone.run is None
    assert "Recipe" not in about.facts
    assert about.facts["Images"] == "8 x 8, grey, 10 classes"
    html = markup.show_models([about])
    assert "without the folder of its run, and no model card lies beside it: how it was trained is not told." in html
    assert "<h4>" not in html
    assert alone.data.fit is Fit.CENTER_CROP


def test_a_shared_model_tells_what_lies_beside_it(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("markdown_it", reason="reads the card: pip install 'pra-pixels[demo]'")
    pytest.importorskip("matplotlib", reason="draws the training curves")
    (shared,) = load_exhibits([pra.export(trained, tmp_path / "shared", licence="mit")], CPU)
    html = markup.show_models([describe(shared)])
    assert "This is a saved model without the folder of its run." in html
    assert [title for title in ("Samples", "Training curves", "Model card") if f"<h4>{title}</h4>" in html] == [
        "Samples", "Training curves", "Model card",
    ]  # fmt: skip
    assert html.count("<img") == 2
    assert "<li>recipe <code>tiny</code>" in html
    assert "library_name" not in html


def test_the_card_that_comes_with_pra_is_shown() -> None:
    pytest.importorskip("markdown_it", reason="reads the card: pip install 'pra-pixels[demo]'")
    html = markup.show_models([describe(load_exhibits([None], CPU)[0])])
    assert html.count("<img") == 2
    assert "<h2>Training</h2>" in html


def test_nothing_of_a_foreign_card_runs_or_is_loaded(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("markdown_it", reason="reads the card: pip install 'pra-pixels[demo]'")
    saved_model = pra.save(pra.load(trained), tmp_path / "saved")
    (saved_model / "README.md").write_text(
        "---\nlicense: mit\n---\n# Mine\n\n<script>run()</script> <img src='https://elsewhere/a.png'>\n\n"
        "![look](https://elsewhere/b.png) [go](javascript:run()) [there](https://elsewhere/) [file](./figures.json)\n"
    )
    html = markup.show_models([describe(load_exhibits([saved_model], CPU)[0])])
    assert "<h1>Mine</h1>" in html
    assert "license: mit" not in html
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html
    assert re.findall(r'href="(.*?)"(.*?)>', html) == [
        ("https://elsewhere/", ' target="_blank" rel="noopener noreferrer"')
    ]
    assert "<a>file</a>" in html


def test_a_card_without_what_reads_it_names_the_extra(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared,) = load_exhibits([pra.export(trained, tmp_path / "shared")], CPU)
    monkeypatch.setitem(sys.modules, "markdown_it", None)
    refused(
        lambda: markup.show_models([describe(shared)]), "a model card needs markdown-it-py", install_command("demo")
    )


def test_two_models_must_have_the_same_classes(trained: Path, tmp_path: Path) -> None:
    model = random_model(num_classes=2)
    model.classes = ("cat", "dog")
    other = pra.save(model, tmp_path / "pets")
    refused(
        lambda: load_exhibits([trained, other], CPU),
        "run and pets have different classes (0, 1, 2, ... (10); cat, dog)",
    )


def test_two_runs_of_one_name_are_told_apart(trained: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        pra.save(pra.load(trained), folder)
    assert [shown.name for shown in load_exhibits(folders, CPU)] == [str(folder) for folder in folders]
    assert [shown.name for shown in load_exhibits([trained], CPU)] == ["run"]


# --- how it looks -------------------------------------------------------------------------------------------


def test_pictures_are_shown_as_they_are_with_names_escaped() -> None:
    model = random_model()
    model.classes = ("a<b>", *model.classes[1:])
    *_, sheets = answer([exhibit(model, "<i>")], asked(label=0, count=2))
    html = markup.show_sheets(sheets)
    assert "<b>" not in html
    assert "<i>" not in html
    assert html.count("<figcaption>a&lt;b&gt;, seed") == 2
    (first, _) = re.findall(r"base64,([^\"]+)", html)
    picture = Image.open(io.BytesIO(base64.b64decode(first)))
    assert picture.size == (8, 6)  # enlarged by the browser, pixel by pixel
    assert 'class="crisp"' in html
    assert list(picture.tobytes()) == to_uint8(sheets[0].pictures[0]).permute(1, 2, 0).flatten().tolist()


def test_messages_are_escaped() -> None:
    assert "&lt;script&gt;" in markup.complain(pra.PraError("<script>"))
    assert 'role="alert"' in markup.complain(pra.PraError("no"))
    assert 'role="status"' in markup.say("yes")


# --- the buttons --------------------------------------------------------------------------------------------


def test_generating_fills_stage_status_and_gallery() -> None:
    handlers = Handlers([exhibit(random_model()), exhibit(random_model(), "two")])
    old = [(Image.new("RGB", (8, 6)), "old")] * (MOST_KEPT - 1)
    *parts, (stage, status, kept) = handlers.generate(2, 0, 1, 2.0, 1, old, Turn(), 0)
    assert "33% of the rows" in "".join(part[1] for part in parts)
    assert all(part[2] == old for part in parts)
    assert stage.count("<img") == 2
    assert "2 pictures in" in status
    assert [caption for _, caption in kept[:3]] == ["one, 2, seed 0, guidance 2", "two, 2, seed 0, guidance 2", "old"]
    assert len(kept) == MOST_KEPT


def test_a_new_press_or_stop_ends_what_was_pressed_before() -> None:
    turn = Turn()
    first = Handlers([exhibit(random_model())]).generate(2, 0, 1, 2.0, 1, [], turn, turn.next())
    next(first)
    assert 'data-rows="2"' in next(first)[0]
    turn.next()
    ((stage, status, kept),) = first
    assert "stopped" in status
    assert 'data-rows="4"' in stage
    assert kept == []


def test_errors_reach_the_page_in_words(tmp_path: Path) -> None:
    handlers = Handlers([exhibit(random_model())])
    bad = tmp_path / "bad.png"
    bad.write_text("?")
    for answers, words in (
        (handlers.generate(0, None, 1, 1.0, 1, [], Turn(), 0), "the seed is empty"),
        (handlers.complete(None, 1, 0, 0, 1, 1.0, 1, [], Turn(), 0), "no picture is uploaded"),
        (handlers.complete(str(bad), 1, 0, 0, 1, 1.0, 1, [], Turn(), 0), "bad.png: not an image"),
    ):
        ((stage, status, kept),) = answers
        assert (stage, kept) == ("", [])
        assert words in status
        assert "alert" in status
    assert "bad.png: not an image" in handlers.preview(str(bad), 1)


def test_what_nobody_foresaw_is_one_sentence_and_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a secret of the server's")

    one = Handlers([exhibit(random_model())])
    path = str(saved(tmp_path / "photo.jpg", (80, 60)))
    monkeypatch.setattr(pra.Sampler, "stream", fail)
    monkeypatch.setattr(handlers, "describe", fail)
    monkeypatch.setattr(markup, "show_sheets", lambda sheets: fail() if "photo" in str(sheets) else "")
    for ask in (
        lambda: [*one.generate(0, 0, 1, 1.0, 1, [], Turn(), 0)][-1],
        lambda: [*one.complete(path, 1, 0, 0, 1, 1.0, 1, [], Turn(), 0)][-1],
        lambda: ("", one.preview(path, 1), []),
        lambda: ("", one.about(), []),
    ):
        assert ask() == ("", markup.complain(pra.PraError(handlers.BROKEN)), [])
        log = capsys.readouterr().err
        assert log.startswith("Traceback")
        assert "RuntimeError: a secret of the server's" in log


def test_completing_an_upload(tmp_path: Path) -> None:
    handlers = Handlers([exhibit(random_model()), exhibit(random_jit(), "jit")])
    path = str(saved(tmp_path / "photo.jpg", (80, 60)))
    preview = handlers.preview(path, 2)
    assert preview.count('style="top: 66.67%"') == 2
    assert "photo.jpg (80x60): scaled to 8x6; what is above the line is kept" in preview
    assert "nothing is kept" in handlers.preview(path, 0)
    *_, (stage, status, kept) = handlers.complete(path, 2, 5, 0, 4, 1.0, 1, [], Turn(), 0)
    assert "4 pictures in" in status
    assert len(kept) == 4
    assert "JiT cannot complete" in stage
    assert handlers.preview(None, 2) == ""


def test_the_page_of_a_model_without_classes_and_of_immoderate_settings() -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
    model = random_model(num_classes=1)
    model.sampling = replace(model.sampling, guidance=40.0, steps=1000)
    built = page.build_page([exhibit(model)])
    props = [component["props"] for component in built.config["components"]]
    values = {one["label"]: (one.get("value"), one.get("visible")) for one in props if one.get("label")}
    assert values["Class"] == (0, False)
    assert values["Guidance (1 is none)"][0] == 10
    assert values["Solver steps"][0] == OWN_STEPS
    (info,) = {one["info"] for one in props if one.get("label") == "Solver steps"}
    assert info == "0: what the model recommends (100)"


# --- the command --------------------------------------------------------------------------------------------


def test_a_port_in_use_and_other_places_to_listen(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(lambda: check_address("127.0.0.1", port), f"port {port} of 127.0.0.1 is in use", "--port")
        assert cli.main(["demo", str(trained), "--port", str(port)]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("pra: error: port")
    check_address("127.0.0.1", port)
    refused(lambda: check_address("127.0.0.1", 0), "--port 0 is out of range")
    refused(lambda: check_address("127.0.0.1", 70000), "--port 70000 is out of range")
    refused(lambda: check_address("203.0.113.7", port), "--host 203.0.113.7 cannot be listened at")
    refused(lambda: check_address("not an address", port), "--host 'not an address' is no address")


class Page:
    """In place of Gradio's: how it was launched, and whether it was closed."""

    def __init__(self) -> None:
        self.launched: dict[str, Any] = {}
        self.closed = False

    def launch(self, **options: Any) -> None:
        self.launched = options

    def close(self, verbose: bool) -> None:
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Without Gradio; ``stand_in(signum)`` chooses the signal that comes while the page is served."""
    monkeypatch.setattr(command, "gradio", lambda: None)
    monkeypatch.setattr(command, "launch_options", dict)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # to be put back

    def choose(signum: int) -> None:
        waiting = SimpleNamespace(wait=lambda: signal.raise_signal(signum))
        monkeypatch.setattr(command, "threading", SimpleNamespace(Event=lambda: waiting))

    # In the background a shell has processes ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield choose
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_it_and_nothing_is_left(
    signum: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[int], None]
) -> None:
    built, before = Page(), signal.getsignal(signal.SIGTERM)

    def build(exhibits: Sequence[Exhibit]) -> Page:
        (Path(os.environ["GRADIO_TEMP_DIR"]) / "upload.png").touch()
        return built

    stand_in(signum)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "build_page", build)
    assert cli.main(["demo", str(trained), "--device", "cpu", "--port", str(free_port())]) == 130
    assert built.closed
    assert list(tmp_path.glob("pra-demo-*")) == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_model_that_comes_with_pra_is_called_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[int], None]
) -> None:
    shown: list[Exhibit] = []
    stand_in(signal.SIGINT)
    monkeypatch.setattr(weights, "SHIPPED", pra.export(trained, tmp_path / "shipped"))
    monkeypatch.setattr(command, "build_page", lambda exhibits: shown.extend(exhibits) or Page())
    assert cli.main(["demo", "--device", "cpu", "--port", str(free_port())]) == 130
    assert [one.name for one in shown] == ["the model that comes with pra"]


def test_an_ipv6_address_is_given_to_gradio_as_it_stands_in_an_address(
    stand_in: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(signal.SIGINT)
    for host, name in (("::1", "[::1]"), ("::", "[::]"), ("127.0.0.1", "127.0.0.1")):
        built = Page()
        with pytest.raises(KeyboardInterrupt):
            command.serve(built, host, 7860)
        assert built.launched["server_name"] == name
    assert "demo: open http://[::1]:7860 in a browser" in capsys.readouterr().out


def test_an_ipv6_address_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
    port, answers = free_port(), []
    try:
        check_address("::1", port)
    except pra.PraError as error:
        pytest.skip(str(error))

    def ask() -> None:
        with urllib.request.urlopen(f"http://[::1]:{port}/") as answered:
            answers.append(answered.status)

    monkeypatch.setattr(command, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=ask)))
    command.serve(page.build_page([exhibit(random_model())]), "::1", port)
    assert answers == [200]


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    refused(page.gradio, "the web demo needs gradio", install_command("demo"))
