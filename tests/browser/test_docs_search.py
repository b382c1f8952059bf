"""The search of the documentation as `make docs` has built it, opened from a disk."""

import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: the search is not tested")
SITE = Path(__file__).resolve().parents[2] / "build" / "site"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: the search is not tested in a browser"),
    pytest.mark.skipif(not SITE.is_dir(), reason="no build/site: `make docs` builds it"),
]


@pytest.mark.parametrize("name", ["index.html", "reference/loop.html"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_search_finds_a_page_and_asks_no_server(name: str, width: int):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto((SITE / name).as_uri())
        if width < 500:
            page.locator("label[for=__search]").first.click()
        page.locator(".md-search__input").click()
        page.keyboard.type("prune")
        page.wait_for_selector(".md-search-result__link", timeout=15_000)
        found = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
        browser.close()
    assert any(link.startswith((SITE / "howto.html").as_uri()) for link in found)
    assert all(url.startswith(("file:", "data:")) for url in requests)
