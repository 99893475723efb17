"""The web demo in a real browser: for its tests and its screenshots."""

import shutil
from contextlib import contextmanager

from pra.demo.page import build_page, launch_options
from support.processes import free_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser():
    """A Chromium of the system's; the one that Playwright would download is not needed."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


@contextmanager
def served(*exhibits):
    """The page of one model or two, in this process: its address."""
    port = free_port()
    page = build_page(exhibits)
    page.launch(server_name="127.0.0.1", server_port=port, **launch_options())
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close(verbose=False)


@contextmanager
def chromium():
    """Playwright's browser. The sandbox needs rights that a container does not give."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
