"""Pages and notebook output: tables, charts and images as HTML that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import jinja2
from PIL import Image

WIDTH, HEIGHT = 264, 110  # pixels of a chart
PIXELATED_BELOW = 128  # tiny images are enlarged with hard edges, so that the model's pixels are visible
MOST_POINTS = 150  # of a line; longer ones are averaged down to so many
# Of lines by their label, and in turn; on a light page as on a dark one.
NAMED = {"winner": "#12986a", "loser": "#d0493f"}
COLOURS = ("#3b7dc4", "#c77d0a", "#8a6bc9", "#0f8f96", "#8a94a3")

Points = Sequence[tuple[float, ...]]  # (x, y), or (x, y, low, high) with the bounds of an interval

# Templates lie beside the modules that fill them in, and extend `utils/page.html.jinja`.
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("t2i_align", "."),
    autoescape=True,  # prompts come from anywhere
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def charts(curves: Mapping[str, Mapping[str, Points]], axis: str = "step") -> str:
    """Charts side by side, by title: lines by label, of points (step, value) or (step, value, low, high).

    What has no finite point is left out.
    """
    drawn = "".join(_chart(title, lines, axis) for title, lines in curves.items())
    return f'<div style="display:flex;flex-wrap:wrap;gap:20px 28px">{drawn}</div>'


def image(file: Path) -> str:
    """An image inside the page."""
    with Image.open(file) as opened:
        uri = data_uri(opened)
    return f'<img src="{uri}" alt="{escape(file.name)}" style="max-width:100%">'


def data_uri(image: Image.Image, side: int = 1024) -> str:
    """An image in a URI; where it is larger than `side` pixels, shrunk to a JPEG."""
    buffer = io.BytesIO()
    if max(image.size) > side:
        image = image.convert("RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer, format=(kind := "jpeg"), quality=88)
    else:
        image.save(buffer, format=(kind := "png"))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(html: str, height: int = 600) -> str:
    """A whole page in a frame of its own, which no script leaves."""
    return f'<iframe srcdoc="{escape(html)}" sandbox style="width:100%;height:{height}px;border:0"></iframe>'


def _chart(title: str, lines: Mapping[str, Points], across: str) -> str:
    finite = {
        label: _thinned([point for point in points if all(map(math.isfinite, point))])
        for label, points in lines.items()
    }
    drawn = {label: points for label, points in finite.items() if points}
    if not drawn:
        return ""
    every = [point for points in drawn.values() for point in points]
    xs, ys = [point[0] for point in every], [y for point in every for y in point[1:]]
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left) if right > left else 0.5
        return f"{WIDTH * across:.1f},{HEIGHT * (1 - ((y - low) / (high - low) if high > low else 0.5)):.1f}"

    shapes, legend = [], []
    if low < 0 < high:
        level = place(left, 0).partition(",")[2]
        shapes.append(f'<path d="M0 {level}H{WIDTH}" stroke="currentColor" stroke-opacity=".35" stroke-dasharray="3"/>')
    for number, (label, points) in enumerate(drawn.items()):
        colour = NAMED.get(label, COLOURS[number % len(COLOURS)])
        places = " ".join(place(*point[:2]) for point in points)
        for x, _, *bounds in points:
            if bounds:
                ends = "L".join(place(x, bound) for bound in bounds)
                shapes.append(f'<path d="M{ends}" stroke="{colour}" stroke-opacity=".5" stroke-width="1.2"/>')
        shapes.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        end = place(*points[-1][:2]).split(",")
        shapes.append(f'<circle cx="{end[0]}" cy="{end[1]}" r="2.6" fill="{colour}"/>')
        name = f'<b style="color:{colour}">{escape(label)}</b> ' if len(drawn) > 1 else ""
        legend.append(f"<span>{name}{points[0][1]:.3g} → {points[-1][1]:.3g}</span>")
    axis = 'font-size="10.5" fill="currentColor" fill-opacity=".6"'
    return (
        f'<figure style="margin:0;width:{WIDTH + 62}px;max-width:100%"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<svg viewBox="-56 -8 {WIDTH + 62} {HEIGHT + 26}" style="width:100%" role="img" aria-label="{escape(title)}">'
        f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="currentColor" stroke-opacity=".25"/>{"".join(shapes)}'
        f'<text x="-6" y="6" text-anchor="end" {axis}>{high:.2g}</text>'
        f'<text x="-6" y="{HEIGHT}" text-anchor="end" {axis}>{low:.2g}</text>'
        f'<text x="0" y="{HEIGHT + 14}" {axis}>{escape(across)} {left:g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 14}" text-anchor="end" {axis}>{right:g}</text></svg>'
        f'<small style="display:flex;flex-wrap:wrap;gap:0 14px;padding-left:52px">{"".join(legend)}</small></figure>'
    )


def _thinned(points: Points) -> Points:
    every = math.ceil(len(points) / MOST_POINTS)
    parts = (points[start : start + every] for start in range(0, len(points), every or 1))
    return [(part[-1][0], *(sum(ys) / len(part) for ys in [*zip(*part, strict=True)][1:])) for part in parts]
