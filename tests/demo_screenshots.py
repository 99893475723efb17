"""Screenshots of the web demo for docs/demo.md.

python tests/demo_screenshots.py RUN OTHER_RUN PICTURE CLASS docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from browser import chromium, served

DESKTOP = {"width": 1180, "height": 640}
PHONE = {"width": 390, "height": 844}
PATIENCE = 120_000  # ms: a CPU may be shared


def main(run: Path, other: Path, picture: Path, label: str, folder: Path) -> None:
    with chromium() as browser:
        with served(run) as address:
            page = opened(browser, address, DESKTOP)
            generate(page)
            page.screenshot(path=folder / "demo-generate.png")
            complete(page, picture, label)
            page.screenshot(path=folder / "demo-complete.png", full_page=True)
            page.get_by_role("tab", name="About").click()
            page.wait_for_timeout(500)
            page.screenshot(path=folder / "demo-about.png", full_page=True)
            phone = opened(browser, address, PHONE)
            generate(phone)
            phone.wait_for_timeout(1000)
            phone.screenshot(path=folder / "demo-phone.png")
        with served(run, other) as address:
            page = opened(browser, address, DESKTOP)
            generate(page)
            page.screenshot(path=folder / "demo-two.png", full_page=True)


def opened(browser: Any, address: str, size: dict[str, int]) -> Any:
    page = browser.new_page(viewport=size)
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for(timeout=PATIENCE)
    return page


def generate(page: Any) -> None:
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("pictures in").first.wait_for(timeout=PATIENCE)


def complete(page: Any, picture: Path, label: str) -> None:
    page.get_by_role("tab", name="Complete").click()
    page.locator("#upload input[type=file]").set_input_files(picture)
    page.locator(".upload img").wait_for(timeout=PATIENCE)
    page.get_by_label("Class").last.click()
    page.get_by_role("option", name=label, exact=True).click()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("pictures in").last.wait_for(timeout=PATIENCE)


if __name__ == "__main__":
    run, other, picture, label, folder = sys.argv[1:]
    main(Path(run), Path(other), Path(picture), label, Path(folder))
