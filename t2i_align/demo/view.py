"""What the pages show, as HTML: samples side by side, a pair to vote on, progress, a run's curves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from t2i_align.demo.media import VIDEOS, MediaFolder
from t2i_align.demo.studio import Drawn, Job
from t2i_align.demo.training import State
from t2i_align.demo.votes import Shown
from t2i_align.diffusion.randomness import permutation
from t2i_align.training.report import advice, curves
from t2i_align.utils import html

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STYLE, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("demo.css", "demo.js"))


def sample(folder: MediaFolder, name: str, label: str) -> str:
    """An image, or a clip that plays in a loop. Tiny ones are enlarged with hard edges."""
    address = f"gradio_api/file={quote(str(folder.path / name))}"
    if name.endswith(VIDEOS):
        return f'<video src="{escape(address)}" aria-label="{escape(label)}" autoplay loop muted playsinline></video>'
    with Image.open(folder.path / name) as image:
        size = image.size
    tiny = ' class="tiny"' if max(size) < html.PIXELATED_BELOW else ""
    return f'<img src="{escape(address)}" alt="{escape(label)}" width="{size[0]}" height="{size[1]}"{tiny}>'


def pair(folder: MediaFolder, shown: Shown | None, total: int) -> str:
    """A pair to vote on, or what to do where there is none."""
    if shown is None:
        text = "You have voted on all pairs. Draw more below." if total else "No pairs yet. Draw some below."
        return f'<p class="empty">{text} Train on the votes, or see the report, in the other tabs.</p>'
    sides = "".join(
        f"<figure>{sample(folder, name, label)}<figcaption>{label}</figcaption></figure>"
        for name, label in ((shown.left, "left"), (shown.right, "right"))
    )
    return f'<p class="prompt">{escape(shown.prompt)}</p><div class="pair">{sides}</div>'


def comparison(folder: MediaFolder, drawn: Sequence[Drawn], blind: bool) -> str:
    """Rows of one prompt and seed, with a column for each model.

    blind: the models are letters, in another order in each row, and without scores.
    """
    rows: dict[tuple[str, int], list[Drawn]] = {}
    for one in drawn:
        rows.setdefault((one.prompt, one.seed), []).append(one)
    parts = []
    for (prompt, seed), cells in rows.items():
        order = permutation(len(cells), "blind", prompt, seed, *(one.file for one in cells)).tolist()
        figures = []
        for place, one in enumerate([cells[i] for i in order] if blind else cells):
            weight = f" × {one.weight:g}" if one.weight != 1 else ""
            label = LETTERS[place % 26] if blind else f"{one.model}{weight}"
            scores = "" if blind else "".join(f"<br>{escape(name)} {value:.3f}" for name, value in one.scores.items())
            caption = f"<figcaption><b>{escape(label)}</b>{scores}</figcaption>"
            figures.append(f"<figure>{sample(folder, one.file, label)}{caption}</figure>")
        heading = f'<p class="prompt">{escape(prompt)} <small>seed {seed}</small></p>'
        parts.append(f'{heading}<div class="samples">{"".join(figures)}</div>')
    return "".join(parts)


def means(drawn: Sequence[Drawn]) -> str:
    """The mean of each scorer by model, where anything was scored."""
    names = list(dict.fromkeys(name for one in drawn for name in one.scores))
    rows = []
    for model in dict.fromkeys(one.model for one in drawn) if names else ():
        values = [[one.scores[name] for one in drawn if one.model == model and name in one.scores] for name in names]
        rows.append([model, *(f"{sum(part) / len(part):.3f}" if part else "–" for part in values)])
    return html.table(["mean of", *names], rows) if rows else ""


def job(current: Job) -> str:
    """A job's progress bar."""
    return _bar(current.done, current.total, current.note)


def progress(done: int, total: int) -> str:
    """How far a user is."""
    return _bar(done, total, f"{done} of {total} pairs")


def run(state: State | None) -> str:
    """A run's progress and curves."""
    if state is None:
        return '<p class="empty">Nothing has been trained here yet.</p>'
    done = next((int(line["step"]) for line in reversed(state.history) if "loss" in line), 0)
    after = ""
    if state.weights and not state.running:
        after = '<p>The LoRA can be drawn now: choose it in the tab "Compare".</p>'
        after += "".join(f"<p>{escape(sentence)}</p>" for sentence in advice(state.history))
    charts = html.charts(curves(state.history))
    return f"{_bar(done, state.steps, '')}<p>{escape(state.message)}</p>{after}{charts}"


def _bar(done: int, total: int, note: str) -> str:
    label = f"<span>{escape(note)}</span>" if note else ""
    return f'<div class="bar"><progress value="{min(done, total)}" max="{max(total, 1)}"></progress>{label}</div>'
