"""The interactive page in a real browser; skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from genoembed import plot
from tests.plotting.map_file import NASTY, write_map_file, write_values

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
PATIENCE_MS = 120_000

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_map_file(folder / "a.h5", failed=(7,))
    write_values(folder / "values.tsv")
    plot(folder / "a.h5", folder / "a.html", values=folder / "values.tsv")
    return folder / "a.html"


@pytest.fixture
def page(page_path):
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=BROWSER,
            args=["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"],
        )
        page = browser.new_page(viewport={"width": 1200, "height": 800}, accept_downloads=True)
        page.set_default_timeout(PATIENCE_MS)
        page.problems, page.requests = [], []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(page_path.as_uri())
        page.wait_for_function("document.querySelectorAll('#map .main-svg').length > 0")
        yield page
        browser.close()


def drawn(page, trace):
    return page.evaluate(f"document.getElementById('map').data[{trace}].x.length")


def test_page_searches_switches_colors_and_downloads_a_lasso(page, tmp_path):
    assert drawn(page, 0) + drawn(page, 1) == 59
    assert page.inner_text("#title") == "a.h5"
    assert "1 without a vector left out" in page.inner_text("#notes")

    page.fill("#search", "</SCRIPT>")
    page.wait_for_function("document.getElementById('found').textContent === '1 of 59 match'")
    assert drawn(page, 2) == 1
    assert page.get_attribute("#hits button", "title") == NASTY

    page.locator("#legend button", has_text="b").first.click()
    page.wait_for_function("document.getElementById('map').data[1].x.length === 40")
    page.select_option("#color", label="gc")
    page.wait_for_function("document.getElementById('map').data[1].marker.showscale === true")
    assert drawn(page, 1) == 59

    page.check('input[value="lasso"]')
    page.wait_for_function("document.getElementById('map')._fullLayout.dragmode === 'lasso'")
    box = page.locator("#map .nsewdrag").bounding_box()
    corners = [(0.01, 0.01), (0.5, 0.01), (0.5, 0.99), (0.01, 0.99), (0.01, 0.02)]
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    page.wait_for_function("document.getElementById('selected').textContent.endsWith(' selected')")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "selected.tsv")
    header, *lines = [line.split("\t") for line in (tmp_path / "selected.tsv").read_text().splitlines()]
    assert header[:8] == ["id", "x", "y", "description", "length", "kind", "gc", "cluster"]
    assert 5 < len(lines) < 59
    middle = np.mean(page.evaluate("document.getElementById('map')._fullLayout.xaxis.range"))
    assert all(float(line[1]) < middle for line in lines)

    assert page.problems == []
    assert page.requests == [page.url]
