"""The tab "Compare": any number of models, the same prompts and seeds, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio

from t2i_align.demo import view
from t2i_align.demo.page import DEVICE, Page, answered, sampling_inputs
from t2i_align.demo.session import prompts_of, rows_of
from t2i_align.demo.studio import Drawn

SHOWN_FIRST = 3  # prompts that are there at first


def add(page: Page, tab: gradio.Tab) -> None:
    """Add the tab's contents."""
    demo = page.demo
    drawn = gradio.State([])
    draw = gradio.Button("Draw", variant="primary", elem_id="draw", render=False)
    blind = gradio.Checkbox(False, label="Blind: hide which is which", elem_id="blind", render=False)
    status, results = (gradio.HTML(elem_id=name, render=False) for name in ("status", "results"))
    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            text = "\n".join(page.defaults.prompts[:SHOWN_FIRST])
            prompts = gradio.Textbox(text, label="Prompts, one per line", lines=4, max_lines=12, elem_id="prompts")
            count, seed, steps, guidance = sampling_inputs(page.defaults)
        with gradio.Column(scale=1, min_width=280):

            @gradio.render(triggers=[page.blocks.load, tab.select], show_progress="hidden")
            def choose() -> None:
                demo.trained()
                chosen: list[Any] = []
                for name, entry in demo.studio.entries.items():
                    chosen.append(gradio.Checkbox(True, label=name, key=f"on {name}", container=False))
                    movable = entry.adapter is not None and entry.adapter.kind == "lora"
                    label = f"Weight of {name}"
                    chosen.append(gradio.Slider(0, 2, 1, step=0.05, label=label, visible=movable, key=f"weight {name}"))
                inputs = [prompts, count, seed, steps, guidance, blind, *chosen]
                outputs = [status, results, drawn]
                draw.click(answered(compare), inputs, outputs, show_progress="hidden", api_name="compare", **DEVICE)

    with gradio.Row(elem_classes="buttons"):
        draw.render()
        stop = gradio.Button("Stop", elem_id="stop")
        offer = gradio.Button("Vote on these", elem_id="offer")
        blind.render()
    status.render()
    results.render()

    def show(samples: Sequence[Drawn], hidden: bool) -> str:
        table = "" if hidden else f'<div class="scrolls">{view.means(samples)}</div>'
        return table + view.comparison(demo.compared, samples, hidden)

    def compare(
        text: str, count: int, seed: int, steps: Any, guidance: Any, hidden: bool, request: gradio.Request, *chosen: Any
    ) -> Iterator[Any]:
        # The models may have become more since the sliders were made, never others or fewer.
        names = list(demo.studio.entries)[: len(chosen) // 2]
        weights = {name: weight for name, on, weight in zip(names, chosen[::2], chosen[1::2], strict=True) if on}
        rows = rows_of(prompts_of(text), count, seed)
        so_far = -1
        for job, samples in demo.draw(
            str(request.session_hash), weights, rows, demo.compared, steps=steps, guidance=guidance
        ):
            changed, so_far = len(samples) != so_far, len(samples)
            yield view.job(job), show(samples, hidden) if changed else gradio.skip(), samples

    def stopped(request: gradio.Request) -> None:
        demo.cancel(str(request.session_hash))

    def offered(samples: Sequence[Drawn]) -> None:
        images = demo.votes.images
        kept = [replace(one, file=images.add(demo.compared.path / demo.compared.check(one.file))) for one in samples]
        count = demo.offer(kept)
        gradio.Info(f"{count} new pairs in the tab Vote" if count else "No new pairs: draw two models or two seeds")

    stop.click(stopped, queue=False, api_visibility="private")
    offer.click(answered(offered), drawn, api_visibility="private")
    blind.change(show, [drawn, blind], results, show_progress="hidden", api_visibility="private")
