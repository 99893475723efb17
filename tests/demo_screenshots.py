"""Screenshots of the web demo for docs/demo.md: of the model that pra ships, of RUN's training, of ONE and OTHER side
by side, and of CAPTIONED, a run that reads captions.

python tests/demo_screenshots.py RUN ONE OTHER CAPTIONED PICTURE CLASS docs/images
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from support.browser import chromium, served

from pra.demo.exhibit import load_exhibits

CPU = torch.device("cpu")
DESKTOP = {"width": 1180, "height": 640}
PHONE = {"width": 390, "height": 844}
PATIENCE = 120_000  # ms: a CPU may be shared


def main(run, one, other, captioned, picture, label, folder):
    with chromium() as browser:
        with served(*load_exhibits([None], CPU)) as address:
            page = opened(browser, address, DESKTOP)
            generate(page)
            shoot(page, folder / "demo-generate.png")
            complete(page, picture, label)
            shoot(page, folder / "demo-complete.png", whole=True)
            about(page)
            shoot(page, folder / "demo-card.png", whole=True)
            phone = opened(browser, address, PHONE)
            generate(phone)
            phone.wait_for_timeout(1000)
            shoot(phone, folder / "demo-phone.png")
        with served(*load_exhibits([run], CPU)) as address:
            page = opened(browser, address, DESKTOP)
            about(page)
            shoot(page, folder / "demo-about.png", whole=True)
        with served(*load_exhibits([one, other], CPU)) as address:
            page = opened(browser, address, DESKTOP)
            generate(page)
            shoot(page, folder / "demo-two.png", whole=True)
        captions(browser, captioned, folder)


def opened(browser, address, size):
    page = browser.new_page(viewport=size)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    return page


def shoot(page, path, whole=False):
    """The window, or the whole page, in 128 colours: half as large as in all."""
    page.screenshot(path=path, full_page=whole)
    with Image.open(path) as taken:
        few = taken.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def generate(page):
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("pictures in").first.wait_for()


def captions(browser, captioned, folder):
    with served(*load_exhibits([captioned], CPU)) as address:
        page = opened(browser, address, DESKTOP)
        page.locator(".gallery-item:visible").first.click()
        page.wait_for_function("document.querySelector('textarea').value")
        generate(page)
        shoot(page, folder / "demo-captions.png", whole=True)


def complete(page, picture, label):
    page.get_by_role("tab", name="Complete").click()
    page.locator("#upload input[type=file]").set_input_files(picture)
    page.locator(".upload img").wait_for()
    page.get_by_label("Class").last.click()
    page.get_by_role("option", name=label, exact=True).click()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("pictures in").last.wait_for()


def about(page):
    page.get_by_role("tab", name="About").click()
    page.locator(".about h4:visible").first.wait_for()


if __name__ == "__main__":
    run, one, other, captioned, picture, label, folder = sys.argv[1:]
    main(Path(run), Path(one), Path(other), Path(captioned), Path(picture), label, Path(folder))
