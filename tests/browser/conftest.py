"""The browser and the server, or the reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from browser_lab import LabPage, find_chromium, make_home, serve

FAST = {"FAST_RUN": True}


@pytest.fixture(scope="session")
def browser() -> Iterator:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright here; pip install playwright to drive a browser"
    )
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here; install it (apt-get install chromium) or name one in $CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("lab"), FAST)


@pytest.fixture(scope="session")
def address(browser, home) -> Iterator[str]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with serve(home) as address:
        yield address


@pytest.fixture
def open_lab(browser, address):
    """Opens pages that are closed at the test's end."""
    pages = []

    def open_page(**options) -> LabPage:
        pages.append(browser.new_page(viewport={"width": 1280, "height": 900}, **options))
        return LabPage(pages[-1], address)

    yield open_page
    for page in pages:
        page.close()
