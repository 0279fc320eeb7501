"""The tab "Personal": pick favourites, and see the same model draw for whoever picked them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio

from t2i_align.demo import view
from t2i_align.demo.page import DEVICE, Page, answered, sampling_inputs
from t2i_align.demo.session import prompts_of, rows_of

PICKS = 4
NONE = """No model here has a personal branch. Train one on the votes of several users, and name it on the command line:

    t2i-align train configs/sd15_diffusion_dpo_lora.yaml lora=null personal.embedder=pickscore data.path=my_votes.jsonl
    t2i-align demo runs/mine
"""


def add(page: Page, tab: gradio.Tab) -> None:
    """Add the tab's contents."""
    demo = page.demo
    models = [name for name, entry in demo.studio.entries.items() if entry.adapter and entry.adapter.kind == "personal"]
    if not models:
        gradio.Markdown(NONE)
        return
    gradio.Markdown("Pick a favourite of each pair; they count as votes. The model reads all your votes as your taste.")
    pairs = gradio.JSON(visible="hidden")  # as in the tab "Vote", what the page shows
    favourites, pages = [], []
    with gradio.Row():
        for number in range(PICKS):
            with gradio.Column(min_width=160):
                pages.append(gradio.HTML())
                favourites.append(
                    gradio.Radio(["left", "right"], show_label=False, visible=False, elem_id=f"favourite-{number}")
                )
    with gradio.Row():
        model = gradio.Dropdown(models, value=models[0], label="Model")
        scale = gradio.Slider(0, 3, 1, step=0.1, label="Strength of the taste")
    text = "\n".join(page.defaults.prompts[:PICKS])
    prompts = gradio.Textbox(text, label="Prompts, one per line", lines=3, elem_id="personal-prompts")
    count, seed, steps, guidance = sampling_inputs(page.defaults)
    with gradio.Row(elem_classes="buttons"):
        draw = gradio.Button("Draw for me", variant="primary", elem_id="draw-for-me")
        stop = gradio.Button("Stop")
    status, results = gradio.HTML(elem_id="personal-status"), gradio.HTML(elem_id="personal-results")

    def show(user: str) -> tuple[Any, ...]:
        upcoming = demo.votes.upcoming(user, PICKS)
        shown = [view.pair(demo.votes.images, one, 1) for one in upcoming]
        return (
            [one.key for one in upcoming],
            *(shown + [""] * PICKS)[:PICKS],
            *(gradio.Radio(value=None, visible=number < len(upcoming)) for number in range(PICKS)),
        )

    def enter(typed: str, request: gradio.Request) -> tuple[Any, ...]:
        return show(page.user(typed, request))

    def drawn(
        keys: Sequence[str], name: str, strength: float, text: str, count: int, seed: int, steps: Any,
        guidance: Any, typed: str, request: gradio.Request, *picked: str | None,
    ) -> Iterator[Any]:  # fmt: skip
        user = page.user(typed, request)
        for key, side in zip(keys, picked, strict=False):
            if side:
                demo.votes.vote(user, demo.votes.shown(key), side)
        following = show(user)
        rows = rows_of(prompts_of(text), count, seed)
        job = demo.draw_for(str(request.session_hash), name, user, rows, scale=strength, steps=steps, guidance=guidance)
        for state, samples in job:
            yield view.job(state), view.comparison(demo.compared, samples, False), *following
            following = tuple(gradio.skip() for _ in following)

    def stopped(request: gradio.Request) -> None:
        demo.cancel(str(request.session_hash))

    shown = [pairs, *pages, *favourites]
    page.on_user(tab, enter, shown, api_visibility="private")
    inputs = [pairs, model, scale, prompts, count, seed, steps, guidance, page.name, *favourites]
    draw.click(
        answered(drawn), inputs, [status, results, *shown], show_progress="hidden", api_name="draw_for_me", **DEVICE
    )
    stop.click(stopped, queue=False, api_visibility="private")
