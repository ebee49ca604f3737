"""Fixtures for the tests of pages: a Chromium that can reach nothing but this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright import sync_api as playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP = {"width": 1280, "height": 900}


# Not for the whole session: while it is open, Playwright's event loop runs in this thread, and asyncio allows no other.
@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", offline, *quiet])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: playwright.Browser, tmp_path: Path) -> Iterator[playwright.Page]:
    """A page that has met no error and has asked one host only; a picture of its end stays in `tmp_path`."""
    page = browser.new_page(viewport=DESKTOP)
    hosts: set[str] = set()
    errors: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.close()
    assert len(hosts - {""}) <= 1  # a data: URL has no host
    assert errors == []
