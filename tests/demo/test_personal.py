"""The tab "Personal": favourites that are picked change what a model with a personal branch draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_align import align
from t2i_align.conditioning import personal
from t2i_align.demo import app
from t2i_align.demo.pairs import pairs_of
from t2i_align.demo.session import Demo
from t2i_align.demo.votes import Votes
from t2i_align.errors import UserError
from tests.demo.conftest import generated, opened, serving, shoot, tab
from tests.reward_scorers.small import write_hf_clip
from tests.runs import run_values


@pytest.fixture(scope="module")
def demo(sd_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A run on the votes of two users, whose branch is made strong: in two steps it learns nothing."""
    folder = tmp_path_factory.mktemp("personal")
    pairs = pairs_of([generated(folder / "images", prompts=16)])
    with Votes.opened(folder / "first") as votes:
        votes.offer(pairs)
        for user in ("ann", "bob"):
            for _ in range(4):
                pair = votes.next(user)
                assert pair and votes.vote(user, pair, "left" if user == "ann" else "right")
    clip = write_hf_clip(folder / "clip")
    options = {"embedder": f"hf-clip:{clip}", "examples": [1, 3], "width": 8}
    data = folder / "first" / "votes.jsonl"
    values = run_values(sd_path, data, folder / "taste", lora=None, personal=options, train__steps=2)
    file = align(values, progress=False).weights
    state = load_file(file)
    state |= {name: 30 * torch.randn_like(t) for name, t in state.items() if "user_v" in name}
    save_file(state, file, {personal.HEADER: json.dumps(vars(personal.read(file)[0]))})
    with app.opened(sd_path, [folder / "taste"], [folder / "images"], folder / "demo") as demo:
        yield demo


def test_a_user_without_votes_is_told_so(demo: Demo) -> None:
    with pytest.raises(UserError, match="carl"):
        list(demo.draw_for("s", "taste", "carl", [("a fox", 1)], steps=1))
    with pytest.raises(UserError, match="unknown model"):
        list(demo.draw_for("s", "elsewhere", "ann", [("a fox", 1)], steps=1))


def test_picked_favourites_bend_the_model(demo: Demo, browser: Any) -> None:
    defaults = app.Defaults(prompts=["a fox", "a hen"], steps=2, guidance=2.0)
    with serving(demo, defaults) as served, opened(browser, served.url, "personal") as page:
        tab(page, "Personal")
        page.locator("#favourite-3").wait_for()
        for number in range(4):
            page.locator(f"#favourite-{number}").get_by_label("left").check()
        page.locator("#draw-for-me").click()
        page.locator("#personal-status", has_text="drawn").wait_for()
        page.locator("#personal-results img").nth(3).wait_for()
        shoot(page, "personal")
        sources = page.locator("#personal-results img").evaluate_all("images => images.map(image => image.src)")
        captions = page.locator("#personal-results b").all_inner_texts()
    user = demo.votes.snapshot()[0]["user"]
    assert [row["vote"] for row in demo.votes.snapshot()] == ["left"] * 4 and user.startswith("guest-")
    assert captions == ["for nobody", f"for {user}"] * 2
    assert len(set(sources)) == 4  # of both prompts, another image for the user
