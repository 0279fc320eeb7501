"""The audit's images as plain SVG, for a report that fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i_align.reward_models.optimise import Curve

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 220, 44, 34, 14
Point = tuple[float, float]


class Frame:
    """Axes from data to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, (y[0], y[1] if y[1] > y[0] else y[0] + 1)

    def at(self, x: float, y: float) -> str:
        """A point as SVG writes it."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return f"{LEFT + across * (WIDTH - LEFT - 12):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP):.1f}"

    def line(self, points: Sequence[Point], kind: str) -> str:
        return f'<polyline class="{kind}" points="{" ".join(self.at(x, y) for x, y in points)}"/>'

    def band(self, points: Sequence[tuple[float, float, float]]) -> str:
        outline = [self.at(x, low) for x, low, _ in points] + [self.at(x, high) for x, _, high in reversed(points)]
        return f'<polygon class="band" points="{" ".join(outline)}"/>'

    def dots(self, points: Sequence[Point]) -> str:
        out = []
        for x, y in points:
            left, top = self.at(x, y).split(",")
            out.append(f'<circle class="dot" cx="{left}" cy="{top}" r="3"/>')
        return "".join(out)

    def ticks(self, xs: Sequence[tuple[float, str]], title: str) -> str:
        out = []
        for x, text in xs:
            left = self.at(x, self.y[0]).split(",")[0]
            out.append(f'<text class="tick" x="{left}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{text}</text>')
        for y in (self.y[0], (self.y[0] + self.y[1]) / 2, self.y[1]):
            top = self.at(self.x[0], y).split(",")[1]
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{top}" text-anchor="end">{y:.2f}</text>')
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{top}" y2="{top}"/>')
        out.append(f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{title}</text>')
        return "".join(out)


def line_plot(curve: Curve) -> str:
    """The oracle's reward with its interval over n (on a log scale) or steps; the proxy's gain is drawn beside it.

    The proxy has no axis of its own: its line is scaled to begin and be as wide as the oracle's axis.
    """
    places = [math.log2(x) for x in curve.x] if curve.kl is not None else [float(x) for x in curve.x]
    lowest, highest = min(curve.low), max(curve.high)
    frame = Frame((places[0], places[-1]), (math.floor(lowest * 20) / 20, math.ceil(highest * 20) / 20))
    gained = [value - curve.proxy[0] for value in curve.proxy]
    widest = max(map(abs, gained)) or 1.0
    scaled = [frame.y[0] + (frame.y[1] - frame.y[0]) * max(0.0, gain) / widest for gain in gained]
    shown = list(zip(places, curve.x, strict=True))[:: max(1, len(places) // 6)]
    body = frame.ticks([(place, str(x)) for place, x in shown], "n" if curve.kl is not None else "steps")
    body += frame.band(list(zip(places, curve.low, curve.high, strict=True)))
    body += frame.line(list(zip(places, scaled, strict=True)), "proxy")
    body += frame.line(list(zip(places, curve.oracle, strict=True)), "oracle")
    return _svg(body, f"{curve.kind}: oracle {curve.oracle[0]:.3f} to {curve.oracle[-1]:.3f}")


def reliability_plot(bins: Sequence[tuple[float, float, int]]) -> str:
    """Share right over predicted chance; on the dashed line per scorer is as right as it claims to be."""
    frame = Frame((0.5, 1.0), (0.4, 1.0))
    points = [(predicted, max(0.4, share)) for predicted, share, _ in bins]
    body = frame.ticks([(x / 10, f"{x * 10} %") for x in range(5, 11)], "predicted chance")
    body += frame.line([(0.5, 0.5), (1.0, 1.0)], "even") + frame.line(points, "oracle") + frame.dots(points)
    return _svg(body, "share right over predicted chance")


def _svg(body: str, label: str) -> str:
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
