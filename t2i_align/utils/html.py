"""How results show themselves in a notebook: tables, plots and images as HTML that needs nothing else."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 240, 70  # pixels of a plot


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def plots(history: Sequence[Mapping[str, float]], names: Sequence[str]) -> str:
    """A line over the steps for each of these metrics that was logged, side by side."""
    drawn = [_plot(name, [(line["step"], line[name]) for line in history if name in line]) for name in names]
    return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(drawn)}</div>'


def image(file: Path) -> str:
    """A PNG, inside the page."""
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{escape(file.name)}" style="max-width:100%">'


def page(html: str, height: int = 600) -> str:
    """A whole page in a frame of its own, which no script leaves."""
    return f'<iframe srcdoc="{escape(html)}" sandbox style="width:100%;height:{height}px;border:0"></iframe>'


def _plot(name: str, points: Sequence[tuple[float, float]]) -> str:
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    places = [
        f"{WIDTH * (x - left) / ((right - left) or 1):.1f},{HEIGHT * (1 - (y - low) / ((high - low) or 1)):.1f}"
        for x, y in points
    ]
    shape = f'<polyline points="{" ".join(places)}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    if len(points) == 1:
        shape = f'<circle cx="{WIDTH / 2}" cy="{HEIGHT / 2}" r="2.5" fill="currentColor"/>'
    return (
        f'<figure style="margin:0"><figcaption>{escape(name)}: {ys[0]:.4g} → {ys[-1]:.4g}</figcaption>'
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="-3 -3 {WIDTH + 6} {HEIGHT + 6}" role="img">{shape}</svg>'
        f"<div><small>step {left:g} to {right:g}, {low:.4g} to {high:.4g}</small></div></figure>"
    )
