"""The page without a browser: its buttons, its HTML, and ``pra demo`` without Gradio's server."""

import base64
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from support.models import CAPTIONED, random_jit, random_model
from support.processes import free_port
from support.refusal import refused

from pra import cli
from pra.commands import demo as command
from pra.demo import handlers, page
from pra.demo.exhibit import load_exhibits
from pra.demo.generation import OWN_STEPS, answer
from pra.demo.handlers import MOST_KEPT, Handlers, Turn, html
from pra.utils.extras import install_command
from pra.utils.pixels import to_uint8


def test_pictures_are_shown_with_names_escaped(exhibit, asked):
    model = random_model()
    model.classes = ("a<b>", *model.classes[1:])
    *_, sheets = answer([exhibit(model, "<i>")], asked(label=0, count=2))
    stage = html("stage", [replace(sheets[0], note="<note>")])
    assert [tag for tag in ("<b>", "<i>", "<note>") if tag in stage] == []
    assert stage.count("<figcaption>a&lt;b&gt;, seed") == 2
    (first, _) = re.findall(r"base64,([^\"]+)", stage)
    picture = Image.open(io.BytesIO(base64.b64decode(first)))
    assert picture.size == (8, 6)  # enlarged by the browser, pixel by pixel
    assert 'class="crisp"' in stage
    assert list(picture.tobytes()) == to_uint8(sheets[0].pictures[0]).permute(1, 2, 0).flatten().tolist()
    assert "&lt;script&gt;" in html("error", "<script>")


# --- the buttons --------------------------------------------------------------------------------------------


def test_generate_fills_stage_status_and_gallery(exhibit):
    old = [(Image.new("RGB", (8, 6)), "old")] * (MOST_KEPT - 1)
    both = Handlers([exhibit(), exhibit(name="two")])
    *parts, (stage, status, kept) = both.make(old, Turn(), 0, None, None, 2, 0, 1, 2.0, 1)
    assert "33% of the rows" in "".join(part[1] for part in parts)
    assert all(part[2] == old for part in parts)
    assert stage.count("<img") == 2
    assert "2 pictures in" in status
    assert [caption for _, caption in kept[:3]] == ["one, 2, seed 0, guidance 2", "two, 2, seed 0, guidance 2", "old"]
    assert len(kept) == MOST_KEPT


def test_new_press_ends_the_earlier_one(exhibit):
    turn = Turn()
    first = Handlers([exhibit()]).make([], turn, turn.next(), None, None, 2, 0, 1, 2.0, 1)
    next(first)
    assert 'data-rows="2"' in next(first)[0]
    turn.next()
    ((stage, status, kept),) = first
    assert ("stopped" in status, 'data-rows="4"' in stage, kept) == (True, True, [])


def test_mistakes_reach_the_page_in_words(exhibit, tmp_path):
    one, bad = Handlers([exhibit()]), tmp_path / "bad.png"
    bad.write_text("?")
    for answers, words in (
        (one.make([], Turn(), 0, None, None, 0, None, 1, 1.0, 1), "the seed is empty"),
        (one.make([], Turn(), 0, None, 1, 0, 0, 1, 1.0, 1), "no picture is uploaded"),
        (one.make([], Turn(), 0, None, None, "dog", 0, 1, 1.0, 1), "no class"),
        (one.make([], Turn(), 0, str(bad), 1, 0, 0, 1, 1.0, 1), "bad.png: not an image"),
    ):
        ((stage, status, kept),) = answers
        assert (stage, kept) == ("", [])
        assert words in status
        assert "alert" in status
    assert "bad.png: not an image" in one.preview(str(bad), 1)


def test_unforeseen_error_stays_in_the_log(exhibit, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("a secret of the server's")

    def made(path):
        return [*one.make([], Turn(), 0, path, path and 1, 0, 0, 1, 1.0, 1)][-1][1]

    one = Handlers([exhibit()])
    for name in ("answer", "describe", "fit_upload"):
        monkeypatch.setattr(handlers, name, fail)
    for ask in (lambda: made(None), lambda: made("a.jpg"), lambda: one.preview("a.jpg", 1), one.about):
        assert ask() == html("error", handlers.BROKEN)
        log = capsys.readouterr().err
        assert log.startswith("Traceback")
        assert "RuntimeError: a secret of the server's" in log


def test_names_that_are_not_utf8_are_shown_escaped(exhibit, trained, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
    model = random_model()
    model.classes = ("caf\udce9\n\x1b", *model.classes[1:])
    (tmp_path / "r\udce9un").symlink_to(trained)
    (run,) = load_exhibits([tmp_path / "r\udce9un"], torch.device("cpu"))
    one = replace(run, model=model)
    *_, (stage, _, kept) = Handlers([one]).make([], Turn(), 0, None, None, 0, 0, 1, 2.0, 1)
    parts = [stage, kept[0][1], Handlers([one]).about()]
    parts += [json.dumps(page.build_page([one]).config, default=str, ensure_ascii=False)]
    for part in parts:
        part.encode()
    assert "caf\\udce9 \\x1b, seed 0" in parts[1]
    assert "udce9un" in parts[3]


def test_complete_continues_an_upload(exhibit, saved, tmp_path):
    both = Handlers([exhibit(), exhibit(random_jit(), "jit")])
    path = str(saved(tmp_path / "photo.jpg", (80, 60)))
    preview = both.preview(path, 2)
    assert preview.count('style="top: 66.67%"') == 2
    assert "photo.jpg (80x60): scaled to 8x6; the part above the line is kept" in preview
    assert "nothing is kept" in both.preview(path, 0)
    *_, (stage, status, kept) = both.make([], Turn(), 0, path, 2, 5, 0, 4, 1.0, 1)
    assert "4 pictures in" in status
    assert len(kept) == 4
    assert "JiT cannot complete" in stage
    assert both.preview(None, 2) == ""


def test_page_limits_the_model_s_own_settings(exhibit, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
    model = random_model(num_classes=1)
    model.sampling = replace(model.sampling, guidance=40.0, steps=1000)
    props = [component["props"] for component in page.build_page([exhibit(model)]).config["components"]]
    values = {one["label"]: [one.get(key) for key in ("value", "visible", "info")] for one in props if one.get("label")}
    assert values["Class"][:2] == [0, False]
    assert values["Guidance scale (1: no guidance)"][0] == 10
    assert values["Solver steps"][0::2] == [OWN_STEPS, "0: the model's own (100)"]
    monkeypatch.setattr(page, "MOST_LISTED", 3)
    (one, *_) = (o["props"] for o in page.build_page([exhibit()]).config["components"] if o["type"] == "dropdown")
    assert len(one["choices"]) == 2 + 3
    assert (one["allow_custom_value"], one["info"].partition(";")[0]) == (True, "The first 3 of 5")
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused(page.gradio, install_command("demo"), code="not-installed")


def test_box_for_captions_is_of_models_that_read_them(exhibit):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
    reader = random_model(CAPTIONED)
    reader.captions = ("<script>run()</script>", "\u202e" + "x" * 100)

    def parts(*shown):
        props = [component["props"] for component in page.build_page(shown).config["components"]]
        boxes = [one for one in props if one.get("label") == "Caption"]
        return boxes, next(one["value"] for one in props if one.get("label") == "Class"), props

    boxes, label, props = parts(exhibit(reader))
    assert [(box["max_length"], box.get("info")) for box in boxes] == [(10_000, None)] * 2
    assert label == reader.condition.null
    examples = [one for one in props if "samples" in one]
    assert [one["samples"] for one in examples] == [[[text] for text in reader.captions]] * 2
    assert examples[0]["sample_labels"] == ["<script>run()</script>", r"\u202e" + "x" * 54 + " ..."]
    assert parts(exhibit())[0] == []
    boxes, label, _ = parts(exhibit(), exhibit(random_model(CAPTIONED, num_classes=1), "reader"))
    assert (boxes[0]["info"], label) == ("Read by reader", -1)


def test_caption_on_stage_and_in_the_gallery_is_text(exhibit):
    one = Handlers([exhibit(random_model(CAPTIONED, num_classes=1))])
    asked = [], Turn(), 0, None, None, 0, 0, 1, 2.0, 1
    *_, (stage, _, kept) = one.make(*asked, "<img src=x>" + "!" * 99)
    assert "<img src=x>" not in stage
    assert "&lt;img src=x&gt;!!!!!, seed 0" in stage
    assert "a caption has 110 bytes in UTF-8, and this model reads the first 16" in stage
    assert kept[0][1] == "<img src=x>!!!!!, seed 0, guidance 2"
    ((_, status, _),) = one.make(*asked, "x" * 10_001)
    assert "the caption has 10,001 letters. Give at most 10,000" in status


# --- the command --------------------------------------------------------------------------------------------


def test_address_where_nobody_can_listen_is_refused(capsys, trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["demo", str(trained), "--port", str(port)]) == 2
        assert f"127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err.splitlines()[-1]
    command.check_address("127.0.0.1", port)
    refused(lambda: command.check_address("127.0.0.1", 70000), port=70000)
    for host in ("203.0.113.7", "not an address"):
        refused(lambda host=host: command.check_address(host, port), "--host", host=host)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_demo_and_nothing_is_left(signum, trained, tmp_path, monkeypatch, capsys):
    """Replace Gradio by a stub. One address needs brackets, the other is open to all."""
    host, shown = ("::1", "[::1]") if signum == signal.SIGINT else ("0.0.0.0", "localhost")
    launched, closed = {}, []

    def build(exhibits):
        assert [one.name for one in exhibits] == ["run"]
        (Path(os.environ["GRADIO_TEMP_DIR"]) / "upload.png").touch()
        return SimpleNamespace(
            launch=lambda **options: launched.update(options), close=lambda verbose: closed.append(1)
        )

    waiting = SimpleNamespace(Event=lambda: SimpleNamespace(wait=lambda: signal.raise_signal(signum)))
    for name, instead in (
        ("gradio", lambda: None), ("launch_options", dict), ("check_address", lambda *_: None),
        ("threading", waiting), ("build_page", build),
    ):  # fmt: skip
        monkeypatch.setattr(command, name, instead)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # to be put back
    # In the background a shell has processes ignore SIGINT.
    before, untouched = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["demo", str(trained), "--device", "cpu", "--host", host, "--port", "7861"]) == 130
        assert signal.getsignal(signal.SIGTERM) == untouched
    finally:
        signal.signal(signal.SIGINT, before)
    assert closed
    assert list(tmp_path.glob("pra-demo-*")) == []
    assert launched["server_name"] == (shown if host == "::1" else host)
    out = capsys.readouterr().out
    assert f"demo: open http://{shown}:7861 in a browser" in out
    assert ("anybody who reaches this machine can use the page" in out) == (host != "::1")


def test_page_is_served_past_a_proxy(exhibit, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("no_proxy", ""), ("NO_PROXY", "example.org")):
        monkeypatch.setenv(name, value)
    at_once = SimpleNamespace(Event=lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(command, "threading", at_once)
    command.serve(page.build_page([exhibit(random_model())]), "127.0.0.1", free_port())
    assert "demo: open" in capsys.readouterr().out
