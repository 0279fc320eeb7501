"""Folders of images to vote on, and a demo with the bundled model that is served."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from t2i_align.demo import app
from t2i_align.demo.session import Demo
from t2i_align.inference.generate import LIST
from t2i_align.utils.files import append_line
from tests.runs import image

SHOTS = os.environ.get("DEMO_SCREENSHOTS")  # folder to leave screenshots in
WIDTHS = (1400, 420)
TIMEOUT = 60  # seconds
CALLS = "**/gradio_api/run/**"  # of functions that do not wait in the queue
PROMPTS = ("a red circle on a white background", "there is a green square")


def generated(folder: Path, prompts: int = 3, per_prompt: int = 2, first: int = 0, model: str = "m") -> Path:
    """A folder as `generate` leaves it."""
    folder.mkdir(parents=True)
    for index in range(prompts * per_prompt):
        image(first + index).save(folder / f"{index:05d}.png")
        row = {"prompt": f"prompt {index // per_prompt}", "seed": 100 + index, "file": f"{index:05d}.png"}
        append_line(folder / LIST, {**row, "model": model, "lora": None})
    return folder


@contextmanager
def serving(demo: Demo, defaults: app.Defaults) -> Iterator[Served]:
    """Serve a demo inside the block."""
    blocks = app.build(app.import_gradio(), demo, defaults)
    url = app.launch(blocks, demo)
    yield Served(demo, url)
    blocks.close(verbose=False)


@dataclass(frozen=True)
class Served:
    """A demo and its address."""

    demo: Demo
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A demo with the bundled model and 60 pairs to vote on."""
    folder = tmp_path_factory.mktemp("served")
    source = generated(folder / "source", prompts=60)
    opening = app.opened("testbed:sd", sources=[source], out=folder / "demo", scorers=["oracle"])
    with opening as demo, serving(demo, app.Defaults(prompts=PROMPTS, steps=4, guidance=1.0)) as served:
        yield served


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (program := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, name: str) -> Iterator[Any]:
    """A page of a demo, in which no script may fail and nothing may come from another server."""
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 1000})
    errors: list[str] = []
    outside: list[str] = []
    page = context.new_page()
    page.set_default_timeout(1000 * TIMEOUT)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith((url, "data:", "blob:")) else outside.append(one.url))
    # Chromium lets requests past for a moment after the first route is set, so the first is not set in `held`.
    page.route(CALLS, lambda route: route.continue_())
    page.goto(url)
    try:
        yield page
    finally:
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"{name}-last.png", full_page=True)
        context.close()
    assert not errors and not outside


def shoot(page: Any, name: str) -> None:
    """Screenshots at both widths; nothing may be wider than the page."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1000})
        page.evaluate("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if SHOTS:
            page.screenshot(path=Path(SHOTS) / f"{name}-{width}.png", full_page=True)
    page.set_viewport_size({"width": WIDTHS[0], "height": 1000})


@contextmanager
def held(page: Any) -> Iterator[list[Any]]:
    """Let nothing that the page asks of its functions reach the server inside the block, as on a slow connection."""
    routes: list[Any] = []
    released = False
    page.route(CALLS, lambda route: route.continue_() if released else routes.append(route))
    yield routes
    released = True
    for route in routes:
        route.continue_()


def until(page: Any, condition: Callable[[], Any]) -> None:
    """Wait until something is so that the page does not show."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "not so within a minute"
        page.wait_for_timeout(50)


def name(page: Any) -> Any:
    """The box with the user's name."""
    return page.locator("#user :is(input, textarea)").first


def tab(page: Any, name: str) -> None:
    """Open a tab."""
    page.get_by_role("tab", name=name, exact=True).click()
