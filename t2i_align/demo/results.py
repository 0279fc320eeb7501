"""The tabs "Train" and "Report": a run on the votes with its curves, and what the votes say so far."""

from __future__ import annotations

from typing import Any

import gradio

from t2i_align.demo import view
from t2i_align.demo.page import Page, answered
from t2i_align.demo.report import report
from t2i_align.demo.training import MAX_STEPS, State, choices

REFRESH = 2.0  # seconds


def add_training(page: Page, tab: gradio.Tab) -> None:
    """Add the contents of the tab "Train"."""
    demo, config = page.demo, page.demo.training.config
    gradio.Markdown(
        f"A run on the votes so far trains a LoRA for `{config.model.path}`, in `{demo.training.folder}`. Ties and "
        "“both bad” are no preference: methods on pairs leave them out."
    )
    with gradio.Row():
        objective = gradio.Dropdown(choices(), value=config.objective.name, label="Objective")
        steps = gradio.Number(
            config.train.steps, label="Steps", precision=0, minimum=1, maximum=MAX_STEPS, elem_id="steps"
        )
        rate = gradio.Number(config.optim.lr, label="Learning rate", minimum=0)
        mine = gradio.Checkbox(False, label="Only my votes")
    with gradio.Row(elem_classes="buttons"):
        start = gradio.Button("Start", variant="primary", elem_id="train")
        stop = gradio.Button("Stop and save")
        make = gradio.Button("File for ComfyUI or A1111")
    file = gradio.File(label="LoRA", interactive=False, visible=False)
    shown = gradio.HTML(elem_id="run", elem_classes="scrolls")
    timer = gradio.Timer(REFRESH, active=False)

    def show(state: State | None) -> tuple[Any, ...]:
        return view.run(state), gradio.Timer(active=bool(state and state.running))

    @answered
    def started(name: str, steps: int, rate: float, own: bool, typed: str, request: gradio.Request) -> tuple[Any, ...]:
        user = page.user(typed, request) if own else None
        demo.training.start(name, steps=steps, lr=rate, user=user)
        return show(demo.training.state())

    @answered
    def exported() -> Any:
        return gradio.File(str(demo.training.export()), visible=True)

    start.click(started, [objective, steps, rate, mine, page.name], [shown, timer], api_name="train")
    stop.click(demo.training.stop, queue=False, api_visibility="private")
    make.click(exported, None, file, api_name="export")
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gradio.on([timer.tick, tab.select, page.blocks.load], lambda: show(demo.trained()), None, [shown, timer], **at_once)


def add_report(page: Page, tab: gradio.Tab) -> None:
    """Add the contents of the tab "Report"."""
    demo = page.demo
    with gradio.Row(elem_classes="buttons"):
        refresh = gradio.Button("Refresh", elem_id="refresh")
    shown = gradio.HTML(elem_id="report", elem_classes="scrolls")
    gradio.Markdown(
        f"All votes are in `{demo.votes.folder / 'votes.jsonl'}`: `t2i-align train … data.path=` reads them."
    )
    gradio.on(
        [refresh.click, tab.select, page.blocks.load], lambda: report(demo.votes.snapshot()).to_html(), None, shown,
        show_progress="hidden", api_name="report",
    )  # fmt: skip
