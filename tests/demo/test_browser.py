"""The demo in a real browser: compare, vote by keys, reload, train on the votes, read the report."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t2i_align.demo import app
from tests.demo.conftest import CALLS, Served, generated, held, name, opened, shoot, tab, until


@pytest.fixture
def page(browser: Any, served: Served, request: pytest.FixtureRequest) -> Iterator[Any]:
    with opened(browser, served.url, request.node.name) as page:
        yield page


def test_compare_side_by_side_and_blind(page: Any, served: Served) -> None:
    page.get_by_label("base", exact=True).wait_for()
    page.locator("#draw").click()
    page.locator("#results img").nth(1).wait_for()
    page.locator("#status", has_text="drawn: 2 samples").wait_for()
    sizes = page.locator("#results img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sizes == [64, 64]
    assert "oracle" in page.locator("#results").inner_text()
    shoot(page, "compare")
    page.get_by_label("Blind").check()
    page.locator("#results b", has_text=re.compile("^A$")).first.wait_for()
    assert "base" not in page.locator("#results").inner_text()


def test_votes_by_keys_survive_a_reload_and_are_trained_on(page: Any, served: Served) -> None:
    votes = served.demo.votes
    tab(page, "Vote")
    name(page).fill("dora")
    name(page).press("Enter")
    page.locator("#progress", has_text=f"0 of {votes.progress('dora')[1]}").wait_for()
    shoot(page, "vote")
    page.locator("#pair").click()  # out of the box, in which keys are letters
    for count, key in enumerate(["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "1", "2"], 1):
        shown = votes.next("dora")
        assert shown
        page.locator(f"#pair img[src*='{shown.left}']").first.wait_for()
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
    assert following
    page.locator(f"#pair img[src*='{following.left}']").first.wait_for()

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


def test_a_name_that_is_typed_at_once_is_kept(page: Any, served: Served) -> None:
    """Also where answers for the guest that somebody was before come late."""
    with held(page) as requests:
        tab(page, "Vote")
        until(page, lambda: requests)
        name(page).fill("emil")
        name(page).press("Enter")
    page.locator("#progress", has_text="of").wait_for()
    first = served.demo.votes.next("emil")
    assert first
    page.locator(f"#pair img[src*='{first.left}']").first.wait_for()
    assert name(page).input_value() == "emil"
    name(page).fill("fred")
    page.reload()
    until(page, lambda: name(page).input_value() == "fred")
    name(page).fill("")
    page.locator("h1").click()
    until(page, lambda: name(page).input_value().startswith("guest-"))


def test_a_name_is_not_filled_in_while_one_is_typed(page: Any) -> None:
    """The box may have the focus before the page has settled who votes."""
    page.add_init_script(
        "new MutationObserver(() => document.querySelector('#user :is(input, textarea)')?.focus())"
        ".observe(document, {childList: true, subtree: true})"
    )
    with page.expect_response(CALLS):  # of another event of the load
        page.reload()
    assert name(page).input_value() == ""
    page.keyboard.type("hugo")
    assert name(page).input_value() == "hugo"


def test_an_account_votes_under_its_name(browser: Any, tmp_path: Path) -> None:
    source = generated(tmp_path / "source", prompts=2)
    with app.opened("testbed:sd", sources=[source], out=tmp_path / "demo") as demo:
        blocks = app.build(app.import_gradio(), demo, app.Defaults(), accounts=True)
        url = app.launch(blocks, demo, accounts=[("anna", "secret")])
        with opened(browser, url, "account") as page:
            page.get_by_label("username").fill("anna")
            page.get_by_label("password").fill("secret")
            page.get_by_role("button", name="Login").click()
            tab(page, "Vote")
            until(page, lambda: name(page).input_value() == "anna")
            page.locator("#pair img").first.wait_for()
            page.locator("#vote-left").click()
            page.locator("#progress", has_text="1 of 2").wait_for()
        assert [row["user"] for row in demo.votes.snapshot()] == ["anna"]
        blocks.close(verbose=False)


def test_a_key_votes_on_the_pair_that_is_seen(page: Any, served: Served) -> None:
    """A second key before the next pair is there is no vote on that pair."""
    votes = served.demo.votes
    name(page).fill("gail")
    tab(page, "Vote")
    shown = votes.next("gail")
    assert shown
    page.locator(f"#pair img[src*='{shown.left}']").first.wait_for()
    with held(page) as requests:
        for count, key in enumerate(("ArrowLeft", "ArrowRight"), 1):
            page.keyboard.press(key)
            until(page, lambda count=count: len(requests) >= count)  # a late one of the tab may be among them
    following = votes.upcoming("gail", 2)[-1]
    page.locator(f"#pair img[src*='{following.left}']").first.wait_for()
    page.locator("#vote-tie").click()
    until(page, lambda: len([row for row in votes.snapshot() if row["user"] == "gail"]) == 2)
    own = [(row["pair"], row["vote"]) for row in votes.snapshot() if row["user"] == "gail"]
    assert own[0][0] == shown.id and own[1] == (following.id, "tie")


def test_keys_do_nothing_while_something_is_typed_or_another_tab_is_open(page: Any) -> None:
    page.evaluate("window.addEventListener('keydown', event => { document.voted = event.defaultPrevented })")
    page.locator("#prompts textarea").press("ArrowLeft")
    assert page.evaluate("document.voted") is False
    page.locator("h1").click()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.voted") is False
    tab(page, "Vote")
    page.locator("#pair img").first.wait_for()
    page.locator("h1").click()
    page.keyboard.press("Shift")
    assert page.evaluate("document.voted") is False
    page.keyboard.press("Backspace")
    assert page.evaluate("document.voted") is True
