"""The page in a real browser: every curve, nothing from outside, text stays text, two widths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.views.report.history import METRICS
from jobs.views.report.page import page
from tests.apt import install
from tests.browser import Browser, browser, chromium
from tests.jobs.views.report.pages import whole_page

SIZES = [(390, False), (390, True), (1440, False), (1440, True)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium() is None and os.environ.get("RLHF_CI") == "1":
        install("chromium", "fonts-dejavu-core")
    program = chromium()
    if program is None:
        pytest.skip("needs Chromium: apt install chromium")
    with browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {"one": [whole_page()], "two": [whole_page("one", seed="1"), whole_page("two", scale=1.5, seed="2" * 90)]}
    for name, each in runs.items():
        (folder / f"{name}.html").write_text(page(each), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in runs}


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_is_whole(shown: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    shown.open(pages[name], width, dark=dark)
    shown.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    shown.value("new Promise(done => setTimeout(done, 300))")
    charts = shown.value("JSON.parse(document.getElementById('data').textContent).charts.length")
    # A curve is drawn where pixels have its colour; empty canvases have axes in other colours.
    drawn = shown.value("""(() => {
        const color = getComputedStyle(document.documentElement).getPropertyValue('--run0').trim();
        const wanted = [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));
        return [...document.querySelectorAll('.plot canvas')].filter(canvas => {
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < data.length; i += 4)
                if (wanted.every((each, k) => Math.abs(data[i + k] - each) < 3) && data[i + 3] > 200) return true;
            return false;
        }).length;
    })()""")
    assert charts == drawn == 3 * len(METRICS)
    assert shown.value("document.documentElement.scrollWidth <= innerWidth")
    assert shown.complaints == []
    assert shown.requests == [pages[name].as_uri()]


def test_a_models_text_stays_text(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["one"], 1440)
    assert shown.value("document.title") == "evil: report"
    assert shown.value("document.querySelectorAll('img, script:not([type]) ~ img, .model *').length") == 0
    texts = shown.value("[...document.querySelectorAll('.model')].map(each => each.textContent)")
    assert any("</script><script>document.title = 'taken'</script><img src=x onerror=" in text for text in texts)
    assert shown.value("[...document.scripts].length") == 3  # the data, uPlot, the page's own


def test_the_browser_itself_refuses_what_is_outside(shown: Browser, pages: dict[str, Path]) -> None:
    """Whatever else fails: the page's policy lets nothing in."""
    shown.open(pages["one"], 1440)
    shown.value("document.body.insertAdjacentHTML('beforeend', '<img src=\"http://192.0.2.1/x.png\">')")
    shown.value("new Promise(done => setTimeout(done, 200))")
    assert any("Content Security Policy" in text for text in shown.complaints)


def test_dark_and_light_are_followed_while_the_page_is_open(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["one"], 1440)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    light = shown.value(paper)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    shown.call("Emulation.setEmulatedMedia", features=[scheme])
    shown.value("new Promise(done => setTimeout(done, 300))")
    assert (light, shown.value(paper)) == ("rgb(250, 249, 246)", "rgb(21, 24, 28)")
    plots = "document.querySelectorAll('.plot').length === document.querySelectorAll('.plot canvas').length"
    assert shown.value(plots) and shown.complaints == []


def test_the_keyboard_reaches_the_curves_and_what_is_folded_away(shown: Browser, pages: dict[str, Path]) -> None:
    shown.open(pages["one"], 1440)

    def press(key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            shown.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9)

    press("Tab")
    assert shown.value("document.activeElement.textContent") == "Skip to the curves"
    reached = []
    for _ in range(12):
        press("Tab")
        reached.append(shown.value("document.activeElement.tagName"))
    assert {"SUMMARY", "DIV"} <= {*reached}  # what is folded, and the tables that scroll
    unnamed = "[...document.querySelectorAll('[role=img], [role=region]')].filter(e => !e.ariaLabel).length"
    assert shown.value(unnamed) == 0
