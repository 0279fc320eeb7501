"""The tab "Vote": a pair at a time, by button or key, and where more pairs come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio

from t2i_align.data.media import MEDIA_SUFFIXES
from t2i_align.demo import view
from t2i_align.demo.page import DEVICE, Page, answered, sampling_inputs
from t2i_align.demo.session import prompts_of, rows_of
from t2i_align.demo.studio import BASE, Drawn
from t2i_align.demo.votes import MAX_SEGMENTS, Shown, segment_columns

BUTTONS = {"left": "← Left", "tie": "↑ Tie", "neither": "↓ Both bad", "right": "Right →"}
SIDES = [("←", "left"), ("=", "tie"), ("→", "right")]  # of a segment; one that is left open is a tie
DRAWN_FIRST = 6  # prompts that are there to draw pairs for


def add(page: Page, tab: gradio.Tab) -> None:
    """Add the tab's contents."""
    demo, name = page.demo, page.name
    # The page sends back which pair it shows: the server's idea of it may already be the next one.
    pair = gradio.Textbox(visible="hidden")
    progress = gradio.HTML(elem_id="progress")
    shown = gradio.HTML(elem_id="pair", elem_classes="pair-area")
    with gradio.Row(visible=False, elem_id="segments") as segments:
        labels = [
            gradio.Radio(SIDES, container=True, min_width=130, elem_id=f"segment-{n}") for n in range(MAX_SEGMENTS)
        ]
    with gradio.Row(elem_classes="buttons votes"):
        buttons = {
            choice: gradio.Button(
                label, elem_id=f"vote-{choice}", variant="primary" if choice in ("left", "right") else "secondary"
            )
            for choice, label in BUTTONS.items()
        }
        undo = gradio.Button("⌫ Undo", elem_id="vote-undo")
    keys = "Keys: ← → for a side, ↑ tie, ↓ both bad, ⌫ takes the last vote back. Each vote is saved at once."
    gradio.Markdown(keys, elem_classes="keys")
    outputs = [pair, shown, progress, segments, *labels]

    def show(user: str) -> tuple[Any, ...]:
        following = demo.votes.next(user)
        done, total = demo.votes.progress(user)
        html = view.pair(demo.votes.images, following, total)
        return following.key if following else "", html, view.progress(done, total), *_segments(following)

    def enter(typed: str, request: gradio.Request) -> tuple[Any, ...]:
        return show(page.user(typed, request))

    def voting(choice: str) -> Any:
        @answered
        def vote(key: str, typed: str, request: gradio.Request, *chosen: str | None) -> tuple[Any, ...]:
            user = page.user(typed, request)
            if key:
                voted = demo.votes.shown(key)
                own = segment_columns(chosen[: voted.segments], voted.segment_seconds)
                demo.votes.vote(user, voted, choice, own)
            return show(user)

        return vote

    @answered
    def take_back(typed: str, request: gradio.Request) -> tuple[Any, ...]:
        user = page.user(typed, request)
        if not demo.votes.undo(user):
            gradio.Info("No vote to take back")
        return show(user)

    # Votes do not wait in the queue behind drawings.
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    page.on_user(tab, enter, outputs, api_name="enter")
    for choice, button in buttons.items():
        button.click(voting(choice), [pair, name, *labels], outputs, api_name=f"vote_{choice}", **at_once)
    undo.click(take_back, name, outputs, api_name="undo", **at_once)
    with gradio.Accordion("More pairs", open=demo.votes.pairs == 0):
        _more(page, tab, show, outputs)


def _segments(shown: Shown | None) -> list[Any]:
    """The row of segments and its boxes, as many as a pair of clips has, with nothing chosen."""
    count, seconds = (shown.segments, shown.segment_seconds) if shown else (0, 0.0)
    boxes = [
        gradio.Radio(value=None, visible=n < count, label=f"{n * seconds:g} to {(n + 1) * seconds:g} s")
        for n in range(MAX_SEGMENTS)
    ]
    return [gradio.Row(visible=count > 0), *boxes]


def _more(page: Page, tab: gradio.Tab, show: Any, outputs: Sequence[Any]) -> None:
    """Draw pairs on the spot, or upload images."""
    demo, name = page.demo, page.name
    with gradio.Tab("Draw"):
        text = "\n".join(page.defaults.prompts[:DRAWN_FIRST])
        prompts = gradio.Textbox(text, label="Prompts, one per line", lines=4, max_lines=12, elem_id="pair-prompts")
        models = gradio.Dropdown(
            list(demo.studio.entries), value=[BASE], multiselect=True, label="Models: one with two seeds, or several"
        )
        count, seed, steps, guidance = sampling_inputs(page.defaults, count=2)
        with gradio.Row(elem_classes="buttons"):
            draw = gradio.Button("Draw pairs", variant="primary", elem_id="draw-pairs")
            stop = gradio.Button("Stop")
        status = gradio.HTML(elem_id="pair-status")
    with gradio.Tab("Upload"):
        prompt = gradio.Textbox(label="Prompt that all these images are for", elem_id="upload-prompt")
        files = gradio.File(
            label="Two or more images or clips", file_count="multiple", file_types=list(MEDIA_SUFFIXES), elem_id="files"
        )
        upload = gradio.Button("Add", elem_id="upload")

    def drawn(
        text: str,
        names: Sequence[str],
        count: int,
        seed: int,
        steps: Any,
        guidance: Any,
        typed: str,
        request: gradio.Request,
    ) -> Iterator[Any]:
        user = page.user(typed, request)
        kept = [gradio.skip()] * len(outputs)
        samples: Sequence[Drawn] = []
        rows = rows_of(prompts_of(text), count, seed)
        weights = dict.fromkeys(names, 1.0)
        options = {"steps": steps, "guidance": guidance}
        for job, so_far in demo.draw(str(request.session_hash), weights, rows, demo.votes.images, **options):
            samples = so_far
            yield view.job(job), *kept
        new = demo.offer(samples)
        yield f"<p>{new} new pairs.</p>", *show(user)

    def uploaded(paths: Sequence[str] | None, text: str, typed: str, request: gradio.Request) -> tuple[Any, ...]:
        user = page.user(typed, request)
        new, refused = demo.upload(paths or (), text)
        for reason in refused:
            gradio.Warning(reason)
        gradio.Info(f"{new} new pairs")
        return None, *show(user)

    def stopped(request: gradio.Request) -> None:
        demo.cancel(str(request.session_hash))

    # A run may have added its LoRA meanwhile.
    tab.select(lambda: gradio.Dropdown(choices=list(demo.studio.entries)), None, models, api_visibility="private")
    inputs = [prompts, models, count, seed, steps, guidance, name]
    draw.click(answered(drawn), inputs, [status, *outputs], show_progress="hidden", api_name="draw_pairs", **DEVICE)
    stop.click(stopped, queue=False, api_visibility="private")
    upload.click(answered(uploaded), [files, prompt, name], [files, *outputs], api_name="upload_pairs")
