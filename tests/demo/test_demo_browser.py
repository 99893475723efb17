"""The web demo in a real browser, headless Chromium driven by Playwright."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import chromium, find_browser, free_port, served
from support.models import random_model

from pra.demo import handlers, page
from pra.demo.exhibit import Exhibit
from pra.demo.upload import MOST_BYTES

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'pra-pixels[demo]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing"),
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt install chromium"),
]

PHONE = {"width": 390, "height": 844}
PATIENCE = 30_000  # ms

# Notes how many pixel rows the first picture of the open tab has, whenever that changes.
WATCH = """() => {
    window.rows = [];
    const look = () => {
        const image = [...document.querySelectorAll('.stage img')].find((one) => one.offsetParent);
        const rows = image ? Number(image.dataset.rows) : 0;
        if (rows !== window.rows.at(-1)) window.rows.push(rows);
    };
    new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""


# Presses Stop the moment the first row is there; a person's or Playwright's press might come after the last.
STOP = """() => {
    const stops = [...document.querySelectorAll('button')].filter((one) => one.innerText === 'Stop');
    const watch = new MutationObserver(() => {
        const image = document.querySelector('.stage img');
        if (!image || image.dataset.rows === '8') return;
        watch.disconnect();
        stops.find((one) => one.offsetParent).click();
    });
    watch.observe(document.body, { subtree: true, childList: true });
}"""


@pytest.fixture(scope="module")
def address(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a run of 4 rows of patches, in a process of its own."""
    temporary = tmp_path_factory.mktemp("temporary")
    with served(trained, temporary=temporary) as address:
        yield address
        assert list(temporary.glob("pra-demo-*/*"))  # what the visitors uploaded and made
    assert list(temporary.glob("pra-demo-*")) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


class Visitor:
    """A page of its own session, which must reach no other host and raise no error in the browser."""

    def __init__(self, browser: Any, address: str, size: dict[str, int] | None = None) -> None:
        self.page = browser.new_context(viewport=size or {"width": 1200, "height": 800}).new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(PATIENCE)
        self.address = address
        self.page.goto(address)
        self.press("Generate", wait=True)

    def press(self, name: str, wait: bool = False) -> None:
        button = self.page.get_by_role("button", name=name, exact=True)
        button.wait_for() if wait else button.click()

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def slowly(self, steps: int) -> None:
        """More solver steps, so that rows take their time."""
        self.page.get_by_role("button", name="How to sample").first.click()
        self.page.get_by_label("number input for Solver steps").first.fill(str(steps))
        self.page.keyboard.press("Tab")

    def waits_for(self, text: str) -> None:
        self.page.locator(f".words:visible:has-text({text!r})").first.wait_for()

    def pictures(self) -> Any:
        return self.page.locator(".stage figure:visible img")

    def leaves(self) -> None:
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))] == []
        self.page.context.close()


def test_generate_row_by_row_and_stop(browser: Any, address: str) -> None:
    visitor = Visitor(browser, address)
    made = []
    for seed in ("7", "8", "7"):
        visitor.page.get_by_label("Seed of the first").first.fill(seed)
        visitor.press("Generate")
        first = visitor.page.locator(f".stage img[alt='0, seed {seed}'][data-rows='8']")
        first.wait_for()
        made.append(first.get_attribute("src"))
        visitor.waits_for("10 pictures in")
    assert made[0] == made[2] != made[1]
    assert visitor.pictures().count() == 10
    assert visitor.pictures().first.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
    assert visitor.pictures().first.bounding_box()["width"] > 100
    visitor.slowly(100)
    visitor.page.evaluate(WATCH)
    visitor.page.evaluate(STOP)
    visitor.press("Generate")
    visitor.waits_for("stopped")
    assert visitor.pictures().first.get_attribute("data-rows") != "8"
    visitor.press("Generate")
    visitor.waits_for("10 pictures in")
    rows = visitor.page.evaluate("window.rows")
    assert {2, 4, 6} & set(rows), rows  # seen on the way: a fast one may be skipped by the browser
    visitor.page.get_by_label("Seed of the first").first.fill("")
    visitor.press("Generate")
    visitor.waits_for("the seed is empty")
    visitor.open("Gallery")
    visitor.page.locator(".gallery-tab .thumbnail-lg").nth(39).wait_for()
    visitor.open("About")
    visitor.page.get_by_text("Samples over training").wait_for()
    assert visitor.page.locator(".plot polyline:visible").count() >= 4
    visitor.leaves()


def test_phone_completes_an_upload(browser: Any, address: str, tmp_path: Path) -> None:
    visitor = Visitor(browser, address, PHONE)
    for tab in ("Gallery", "About", "Generate", "Complete"):
        visitor.open(tab)
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    chooser = visitor.page.locator("#upload input[type=file]")
    bad, good = tmp_path / "letter.jpg", tmp_path / "photo.jpg"
    bad.write_text("Dear all")
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(good)
    chooser.set_input_files(bad)
    visitor.waits_for("letter.jpg: not an image")
    visitor.press("Complete")
    visitor.page.locator(".results .words.error:visible").wait_for()
    visitor.page.get_by_label("Clear").first.click()
    chooser.set_input_files(good)
    visitor.page.get_by_text("photo.jpg (300x200): turned grey, scaled, and the middle 8x8 cut out").wait_for()
    visitor.press("Complete")
    visitor.waits_for("4 pictures in")
    assert visitor.pictures().count() == 4
    assert visitor.pictures().first.get_attribute("data-rows") == "8"
    visitor.page.wait_for_function(
        "[...document.querySelectorAll('.stage img')].find((one) => one.offsetParent)"
        ".getBoundingClientRect().bottom < innerHeight"
    )
    assert "Traceback" not in visitor.page.content()
    visitor.leaves()


# --- a page in this process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def go_on() -> threading.Event:
    """What lets pictures be made."""
    return threading.Event()


@pytest.fixture(scope="module")
def busy(go_on: threading.Event) -> Iterator[str]:
    """A page for two visitors at a time."""
    answer = handlers.answer

    def in_its_time(*asked: Any) -> Iterator[Any]:
        sheets = answer(*asked)
        yield next(sheets)
        go_on.wait(PATIENCE / 1000)
        yield from sheets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "MOST_WAITING", 1)
        patch.setattr(handlers, "answer", in_its_time)
        port = free_port()
        built = page.build_page([Exhibit("one", Path("one"), None, None, random_model())])
        built.launch(server_name="127.0.0.1", server_port=port, **page.launch_options())
        yield f"http://127.0.0.1:{port}"
        go_on.set()
        built.close(verbose=False)


def test_full_queue_and_large_upload_are_refused(
    browser: Any, busy: str, go_on: threading.Event, tmp_path: Path
) -> None:
    first, second, third = (Visitor(browser, busy) for _ in range(3))
    first.press("Generate")
    first.waits_for("0% of the rows")
    second.press("Generate")
    second.page.get_by_text("queue:").first.wait_for()
    third.press("Generate")
    third.page.get_by_text("This application is currently busy. Please try again.").wait_for()
    go_on.set()
    for visitor in (first, second):
        visitor.waits_for("10 pictures in")
        assert visitor.pictures().count() == 10
    third.press("Generate")
    third.waits_for("10 pictures in")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    third.open("Complete")
    third.page.locator("#upload input[type=file]").set_input_files(large)
    third.page.get_by_text('exceed the maximum allowed size of 32.0 Mb: "large.png"').wait_for()
    assert "Traceback" not in third.page.content()
    for visitor in (first, second, third):
        visitor.leaves()


def test_unforeseen_error_is_one_sentence(
    browser: Any, busy: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(handlers, "answer", lambda *_: 1 / 0)
    visitor = Visitor(browser, busy)
    visitor.press("Generate")
    visitor.waits_for(handlers.BROKEN[:40])
    assert "ZeroDivisionError" not in visitor.page.content()
    assert "ZeroDivisionError" in capfd.readouterr().err
    visitor.leaves()
