"""The demo in a real browser: compare, vote by keys, reload, train on the votes, read the report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo.conftest import Served

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
SHOTS = os.environ.get("DEMO_SCREENSHOTS")  # folder to leave them in
WIDTHS = (1400, 420)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, served: Served) -> Iterator[playwright.Page]:
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 1000})
    errors: list[str] = []
    outside: list[str] = []
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: outside.append(request.url) if not _ours(request.url, served) else None)
    page.goto(served.url)
    yield page
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / "last.png", full_page=True)
    context.close()
    assert not errors
    assert not outside  # fonts, scripts, analytics


def _ours(url: str, served: Served) -> bool:
    return url.startswith((served.url, "data:", "blob:"))


def shoot(page: playwright.Page, name: str) -> None:
    """Screenshots at both widths; nothing may be wider than the page."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"{name}-{width}.png", full_page=True)
    page.set_viewport_size({"width": WIDTHS[0], "height": 1000})


def tab(page: playwright.Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def test_compare_side_by_side_and_blind(page: playwright.Page, served: Served) -> None:
    page.get_by_label("base", exact=True).wait_for()
    page.locator("#draw").click()
    page.locator("#results img").nth(1).wait_for()
    page.locator("#status", has_text="drawn: 2 samples").wait_for()
    sizes = page.locator("#results img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sizes == [64, 64]
    assert "oracle" in page.locator("#results").inner_text()
    shoot(page, "compare")
    page.get_by_label("Blind").check()
    page.locator("#results b", has_text="A").first.wait_for()
    assert "base" not in page.locator("#results").inner_text()


def test_votes_by_keys_survive_a_reload_and_are_trained_on(page: playwright.Page, served: Served) -> None:
    votes = served.demo.votes
    tab(page, "Vote")
    page.locator("#user input, #user textarea").first.fill("dora")
    page.locator("#user input, #user textarea").first.press("Enter")
    page.locator("#progress", has_text=f"0 of {votes.progress('dora')[1]}").wait_for()
    shoot(page, "vote")
    page.locator("#pair").click()  # out of the box, in which keys are letters
    for count, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "1", "2"], 1):
        shown = votes.next("dora")
        assert shown and shown.left in str(page.locator("#pair img").first.get_attribute("src"))
        page.keyboard.press(key)
        page.locator("#progress", has_text=f"{count} of").wait_for()
    own = [row["vote"] for row in votes.snapshot() if row["user"] == "dora"]
    assert own == ["left", "right", "tie", "neither", "left", "right"]
    page.keyboard.press("Backspace")
    page.locator("#progress", has_text="5 of").wait_for()
    following = votes.next("dora")
    page.reload()
    tab(page, "Vote")
    page.locator("#progress", has_text="5 of").wait_for()
    assert following and following.left in str(page.locator("#pair img").first.get_attribute("src"))

    tab(page, "Train")
    page.get_by_label("Steps", exact=True).locator("visible=true").fill("2")
    page.get_by_label("Only my votes").check()
    page.locator("#train").click()
    page.locator("#run", has_text="has finished").wait_for(timeout=240_000)
    assert page.locator("#run svg").count() > 0
    shoot(page, "train")
    tab(page, "Compare")
    page.get_by_label("votes 1", exact=True).wait_for()

    tab(page, "Report")
    page.locator("#report", has_text="dora").wait_for()
    shoot(page, "report")


def test_keys_do_nothing_while_something_is_typed_or_another_tab_is_open(page: playwright.Page, served: Served) -> None:
    before = len(served.demo.votes.snapshot())
    page.locator("#prompts textarea").press("ArrowLeft")
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(500)
    assert len(served.demo.votes.snapshot()) == before
