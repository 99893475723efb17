"""The web demo in a real browser, headless Chromium driven by Playwright."""

import importlib.util
import re
import threading

import pytest
import torch
from PIL import Image
from support.browser import chromium, find_browser, served
from support.models import CAPTIONED, random_model

import pra
from pra.demo import handlers, page
from pra.demo.exhibit import load_exhibits
from pra.demo.upload import MOST_BYTES

MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"pip install {' '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.queueing"),
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt install chromium"),
]

PHONE = {"width": 390, "height": 844}
PATIENCE = 30_000  # ms


class Pace(threading.Semaphore):
    """A semaphore that paces generation: each permit lets one row of patches through."""

    def go(self, rows=1000):
        self.release(rows)

    def hold(self):
        while self.acquire(blocking=False):
            pass


@pytest.fixture(scope="module")
def pace():
    return Pace(0)


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory, pace):
    """Serve a run with 4 rows of patches; the queue holds one visitor."""
    answer, temporary = handlers.answer, tmp_path_factory.mktemp("temporary")

    def in_its_time(*asked):
        for sheets in answer(*asked):
            yield sheets
            pace.acquire(timeout=PATIENCE / 1000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(temporary))
        patch.setattr(page, "MOST_WAITING", 1)
        patch.setattr(handlers, "answer", in_its_time)
        with served(*load_exhibits([trained], torch.device("cpu"))) as address:
            yield address
            assert list(temporary.iterdir())  # uploads and generated images
            pace.go()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


class Visitor:
    """A browser page in its own session; ``leaves`` checks that it saw no error and reached no other host."""

    def __init__(self, browser, address, size=None):
        self.page = browser.new_context(viewport=size or {"width": 1200, "height": 800}).new_page()
        self.errors = []
        self.requests = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.set_default_timeout(PATIENCE)
        self.address = address
        self.page.goto(address)
        self.page.get_by_role("button", name="Generate", exact=True).wait_for()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def open(self, tab):
        self.page.get_by_role("tab", name=tab).click()

    def seeds(self, text):
        self.page.get_by_label("First seed").first.fill(text)

    def waits_for(self, text):
        self.page.locator(f".words:visible:has-text({text!r})").first.wait_for()

    def pictures(self):
        return self.page.locator(".stage figure:visible img")

    def leaves(self):
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith((self.address, "data:", "blob:"))] == []
        assert "Traceback" not in self.page.content()
        self.page.context.close()


def test_generate_stop_and_wait_in_the_queue(browser, address, pace):
    visitor = Visitor(browser, address)
    pace.go()
    made = []
    for seed in ("7", "8", "7"):
        visitor.seeds(seed)
        visitor.press("Generate")
        first = visitor.page.locator(f".stage img[alt='0, seed {seed}'][data-rows='8']")
        first.wait_for()
        made.append(first.get_attribute("src"))
        visitor.waits_for("10 pictures in")
    assert made[0] == made[2] != made[1]
    assert visitor.pictures().count() == 10
    assert visitor.pictures().first.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
    assert visitor.pictures().first.bounding_box()["width"] > 100
    pace.hold()
    visitor.press("Generate")
    visitor.waits_for("0% of the rows")
    pace.go(1)
    visitor.waits_for("25% of the rows")
    assert visitor.pictures().first.get_attribute("data-rows") == "2"
    second, third = (Visitor(browser, address) for _ in range(2))
    second.press("Generate")
    second.page.get_by_text("queue:").first.wait_for()
    third.press("Generate")
    third.page.get_by_text("This application is currently busy. Please try again.").wait_for()
    with visitor.page.expect_response(re.compile("run/predict")):
        visitor.press("Stop")
    pace.go()
    visitor.waits_for("stopped")
    assert visitor.pictures().first.get_attribute("data-rows") != "8"
    for other in (second, third):
        if other is third:
            other.press("Generate")
        other.waits_for("10 pictures in")
        assert other.pictures().count() == 10
        other.leaves()
    visitor.press("Generate")
    visitor.waits_for("10 pictures in")
    visitor.seeds("")
    visitor.press("Generate")
    visitor.waits_for("the seed is empty")
    visitor.open("Gallery")
    visitor.page.locator(".gallery-tab .thumbnail-lg").nth(39).wait_for()
    visitor.open("About")
    visitor.page.get_by_text("Samples over training").wait_for()
    visitor.page.get_by_alt_text("Training curves").wait_for()
    visitor.leaves()


def test_demo_takes_captions_of_any_kind(browser, trained, tmp_path, pace):
    """Serve a caption model beside a class model. A click on an example fills the box; download names are safe."""
    reader = random_model(CAPTIONED, num_classes=1)
    reader.captions = ("a cat", "<b onclick='x'>dog</b>", "x" * 100)
    pace.go()
    with served(*load_exhibits([trained, pra.save(reader, tmp_path / "reader")], torch.device("cpu"))) as address:
        visitor = Visitor(browser, address)
        box = visitor.page.get_by_label("Caption").first
        visitor.page.get_by_text("<b onclick='x'>dog</b>").first.click()
        visitor.page.wait_for_function("[...document.querySelectorAll('textarea')].some((one) => one.value)")
        assert box.input_value() == "<b onclick='x'>dog</b>"
        for seed, caption, shown in (
            ("1", "<script>throw 1</script>", "<script>throw 1<"),
            ("2", "\N{PANDA FACE} \u05d7\u05ea\u05d5\u05dc", "\N{PANDA FACE} \u05d7\u05ea\u05d5\u05dc"),
            ("3", "../../\x1b\u202e", r"../../\x1b\u202e"),
            ("4", "x" * 10_000, "x" * 16),
            ("5", "   ", "no caption"),
        ):
            visitor.seeds(seed)
            box.fill(caption)
            visitor.press("Generate")
            visitor.page.get_by_text(f"{shown}, seed {seed}", exact=True).first.wait_for()
            visitor.waits_for("20 pictures in")
            if seed == "4":
                visitor.waits_for("a caption has 10000 bytes in UTF-8, and this model reads the first 16")
        visitor.open("Gallery")
        visitor.page.locator(".gallery-tab .thumbnail-lg").nth(30).click()
        with visitor.page.expect_download() as download:
            visitor.page.get_by_label("Download").click()
        assert download.value.suggested_filename == "image.png"
        visitor.leaves()
        phone = Visitor(browser, address, PHONE)
        phone.page.get_by_text("x" * 60).first.wait_for()
        assert phone.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        phone.leaves()


def test_phone_completes_an_upload(browser, address, pace, tmp_path):
    visitor = Visitor(browser, address, PHONE)
    pace.go()
    for tab in ("Gallery", "About", "Generate", "Complete"):
        visitor.open(tab)
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    chooser = visitor.page.locator("#upload input[type=file]")
    bad, good, large = tmp_path / "letter.jpg", tmp_path / "photo.jpg", tmp_path / "large.png"
    bad.write_text("Dear all")
    Image.linear_gradient("L").resize((300, 200)).convert("RGB").save(good)
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    chooser.set_input_files(large)
    visitor.page.get_by_text('exceed the maximum allowed size of 32.0 Mb: "large.png"').wait_for()
    chooser.set_input_files(bad)
    visitor.waits_for("letter.jpg: not an image")
    visitor.press("Complete")
    visitor.page.locator(".results .words.error:visible").wait_for()
    visitor.page.get_by_label("Clear").first.click()
    chooser.set_input_files(good)
    visitor.page.get_by_text(
        "photo.jpg (300x200): converted to grey, scaled, then cropped to the middle 8x8"
    ).wait_for()
    visitor.press("Complete")
    visitor.waits_for("4 pictures in")
    assert visitor.pictures().count() == 4
    assert visitor.pictures().first.get_attribute("data-rows") == "8"
    visitor.page.wait_for_function(
        "[...document.querySelectorAll('.stage img')].find((one) => one.offsetParent)"
        ".getBoundingClientRect().bottom < innerHeight"
    )
    visitor.leaves()
