"""A headless browser for tests of pages; they are skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 120_000


@contextmanager
def opened_page(path: Path, **options: Any) -> Iterator[Any]:
    """Open a page from its file; ``page.problems`` gets its errors, ``page.requests`` what it loads."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, NAMES)), None)
    if browser_path is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        try:
            page = browser.new_page(**options)
            page.set_default_timeout(PATIENCE_MS)
            page.problems, page.requests = [], []
            page.on("pageerror", lambda error: page.problems.append(str(error)))
            page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
            page.on("request", lambda request: page.requests.append(request.url))
            page.goto(path.as_uri())
            yield page
        finally:
            browser.close()
