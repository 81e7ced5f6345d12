"""The interactive page in a real browser; skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import time

import pytest

from genoembed import plot
from tests.browser import opened_page
from tests.plotting.map_file import NASTY, write_map_file, write_values

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_map_file(folder / "a.h5", failed=(7,))
    write_values(folder / "values.tsv")
    plot(folder / "a.h5", folder / "a.html", values=folder / "values.tsv")
    return folder / "a.html"


def wait_for(page, claim, expected=True):
    """Wait until an expression has a value; the page's own policy forbids playwright's way of waiting."""
    end = time.monotonic() + 60
    while (found := page.evaluate(claim)) != expected:
        assert time.monotonic() < end, (claim, found)
        time.sleep(0.05)


def settled(page):
    page.evaluate("new Promise(done => setTimeout(() => requestAnimationFrame(done), 200))")


def background(page):
    """Color of the map's upper right corner, as drawn."""
    settled(page)
    return page.evaluate(
        "(c => [...c.getContext('2d').getImageData(c.width - 2, 1, 1, 1).data])"
        "(document.getElementById('points'))"
    )


def test_page_searches_switches_colors_and_downloads_a_lasso(page_path, tmp_path):
    with opened_page(page_path, viewport={"width": 1200, "height": 800}, accept_downloads=True) as page:
        assert page.get_attribute("#map", "aria-label") == "Map of 59 records"
        assert page.inner_text("#title") == "a.h5"
        assert "1 without a vector left out" in page.inner_text("#notes")

        page.fill("#search", "</SCRIPT>")
        wait_for(page, "document.getElementById('found').textContent", "1 of 59 match")
        assert page.get_attribute("#hits button", "title") == NASTY
        page.locator("#hits button").click()
        assert page.locator("#tip.pinned").inner_text().startswith(f"r0\n{NASTY}")

        page.focus("#map")
        page.keyboard.press("0")  # from the middle of the record found back to all of them
        settled(page)
        entry = page.locator("#legend button").nth(1)
        assert entry.inner_text().split() == ["b", "18"]
        before = page.locator("#points").screenshot()
        entry.click()
        settled(page)
        assert entry.get_attribute("aria-pressed") == "false"
        assert page.locator("#points").screenshot() != before

        page.select_option("#color", label="gc")
        assert page.locator("#legend .bar").count() == 1
        assert page.locator("#legend .ticks").inner_text().split()[:2] == ["0", "0.2"]

        page.check('input[value="lasso"]')
        box = page.locator("#points").bounding_box()
        corners = [(0.01, 0.01), (0.5, 0.01), (0.5, 0.99), (0.01, 0.99), (0.01, 0.02)]
        places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in corners]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=4)
        page.mouse.up()
        wait_for(page, "document.getElementById('selected').textContent.endsWith(' selected')")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "selected.tsv")
        header, *lines = [line.split("\t") for line in (tmp_path / "selected.tsv").read_text().splitlines()]
        assert header[:8] == ["id", "x", "y", "description", "length", "kind", "gc", "cluster"]
        assert 5 < len(lines) < 59
        with page.expect_download() as download:
            page.click("#picture")
        download.value.save_as(tmp_path / "map.png")
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
        assert page.problems == []
        assert page.requests == [page.url]


def test_page_is_used_by_keys_alone(page_path):
    with opened_page(page_path, viewport={"width": 1200, "height": 800}) as page:
        page.focus("#map")
        seen = []
        for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "PageDown"):
            page.keyboard.press(key)
            seen.append(page.inner_text("#tip b"))
        assert len(set(seen)) > 2
        assert page.text_content("#spoken").startswith(seen[-1] + ", ")
        page.keyboard.press("Enter")
        assert page.locator("#tip.pinned").is_visible()
        page.keyboard.press("Space")
        assert page.inner_text("#selected") == "1 selected"
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.keyboard.press("Escape")
        assert page.inner_text("#selected").startswith("Choose")

        page.focus("#legend button")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        states = [one.get_attribute("aria-pressed") for one in page.locator("#legend button").all()]
        assert states == ["true", "false", "true", "true"]  # a, b, c, no value
        page.fill("#search", "number 12")
        wait_for(page, "document.getElementById('found').textContent", "1 of 59 match")
        page.keyboard.press("Enter")
        assert page.inner_text("#tip b") == "r12"
        assert page.problems == []


def test_page_follows_the_browser_and_its_button(page_path):
    with opened_page(page_path, color_scheme="dark") as page:
        assert background(page) == [21, 24, 28, 255]
        page.click("#theme")
        assert background(page) == [255, 255, 255, 255]
    with opened_page(page_path, color_scheme="light", viewport={"width": 390, "height": 800}) as page:
        assert background(page) == [255, 255, 255, 255]
        page.emulate_media(color_scheme="dark")
        assert background(page) == [21, 24, 28, 255]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
