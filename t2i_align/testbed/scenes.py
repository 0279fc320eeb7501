"""The drawn world: scenes of one to three coloured shapes, rendered at 64 x 64 pixels.

A scene is fully described by its objects and its background, so the truth about every image is
known. Positions are in pixels with y pointing down. Drawing uses signed distances, hence edges are
antialiased and a shape's area does not depend on where it falls on the pixel grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

SIDE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.97, 0.92, 0.10),
    "green": (0.10, 0.70, 0.15),
    "cyan": (0.10, 0.85, 0.85),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.50, 0.10, 0.80),
    "pink": (1.00, 0.35, 0.75),
}
BACKGROUNDS: dict[str, float] = {"white": 1.0, "gray": 0.5, "black": 0.0}
# Radii in pixels. The gap between the ranges keeps "small" and "large" decidable after the VAE.
RADII: dict[str, tuple[float, float]] = {"small": (5.8, 6.8), "large": (9.8, 11.4)}
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
KINDS = {"single": 0.25, "pair": 0.45, "count": 0.15, "triple": 0.15}
DEGRADATIONS = ("blur", "fade", "mottle")

# Shape size in units of the radius, chosen for nearly equal areas (about pi r^2), so that area tells
# the size whatever the shape: half side, circumradius, half diagonal, and a cross's arm.
_SQUARE, _TRIANGLE, _DIAMOND, _ARM, _ARM_WIDTH = 0.89, 1.45, 1.25, 1.15, 0.42
# Half extents in units of the radius: left = right, up, down.
EXTENTS: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE),
    "triangle": (_TRIANGLE * 0.866, _TRIANGLE, _TRIANGLE / 2),
    "diamond": (_DIAMOND, _DIAMOND, _DIAMOND),
    "cross": (_ARM, _ARM, _ARM),
}


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape; `x`, `y` are its centre and `radius` its size, all in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (left, top, right, bottom) in pixels."""
        across, up, down = (self.radius * e for e in EXTENTS[self.shape])
        return self.x - across, self.y - up, self.x + across, self.y + down

    def at(self, x: float, y: float) -> Object:
        """The object moved to (x, y)."""
        return dataclasses.replace(self, x=float(x), y=float(y))


@dataclasses.dataclass(frozen=True)
class Scene:
    """A kind (`KINDS`), a background (`BACKGROUNDS`) and one to four objects that never overlap.

    In a pair the first object stands in `relation` to the second. `stray` is the number of objects at the end of
    `objects` that no caption mentions: a planted fault in the training images of the bases.
    """

    kind: str
    background: str
    objects: tuple[Object, ...]
    relation: str | None = None
    stray: int = 0

    @property
    def stated_objects(self) -> tuple[Object, ...]:
        return self.objects[: len(self.objects) - self.stray]


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline of `shape` at offsets (x, y) from its centre; negative inside."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(ax, ay) - _SQUARE * radius
    if shape == "diamond":
        return (ax + ay - _DIAMOND * radius) / np.sqrt(2.0)
    if shape == "triangle":
        inradius = _TRIANGLE * radius / 2
        return np.maximum(y, 0.866 * ax - 0.5 * y) - inradius
    if shape == "cross":
        arm, width = _ARM * radius, _ARM_WIDTH * radius
        return np.minimum(np.maximum(ax - arm, ay - width), np.maximum(ax - width, ay - arm))
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: float32 [64, 64, 3] in [0, 1]."""
    grid = np.arange(SIDE, dtype=np.float32) + 0.5
    pixels = np.full((SIDE, SIDE, 3), BACKGROUNDS[scene.background], np.float32)
    for item in scene.objects:
        distance = signed_distance(item.shape, grid[None, :] - item.x, grid[:, None] - item.y, item.radius)
        alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
        pixels += alpha * (np.asarray(COLOURS[item.colour], np.float32) - pixels)
    return pixels


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """[0, 1] floats to 8 bit, rounded."""
    return (np.clip(pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def box_gap(a: Object, b: Object) -> float:
    """Pixels between two bounding boxes along the axis that separates them most; negative where they overlap."""
    (l1, t1, r1, b1), (l2, t2, r2, b2) = a.box, b.box
    return max(l2 - r1, l1 - r2, t2 - b1, t1 - b2)


def fits(item: Object, others: Sequence[Object], gap: float = 3.0, margin: float = 1.0) -> bool:
    """Whether the item's box is `margin` pixels inside the frame and `gap` pixels from every other box."""
    left, top, right, bottom = item.box
    inside = min(left, top) >= margin and max(right, bottom) <= SIDE - margin
    return inside and all(box_gap(item, other) >= gap for other in others)


def _draw_spec(rng: np.random.Generator) -> tuple[str, str, str]:
    shape, colour, size = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, RADII))
    return shape, colour, size


def _draw(rng: np.random.Generator, shape: str, colour: str, size: str) -> Object:
    x, y = rng.uniform(7, SIDE - 7, 2)
    return Object(shape, colour, size, float(x), float(y), float(rng.uniform(*RADII[size])))


def _place(rng: np.random.Generator, item: Object, others: list[Object]) -> Object | None:
    """The item at a random place where it touches no other; None after 60 failures."""
    places = (item.at(*rng.uniform(7, SIDE - 7, 2)) for _ in range(60))
    return next((moved for moved in places if fits(moved, others)), None)


def relation_between(dx: float, dy: float) -> str | None:
    """Where the first of two objects stands, from centre offsets first minus second; None on the diagonal."""
    if abs(dx) > 1.3 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > 1.3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _place_pair(rng: np.random.Generator, items: list[Object], relation: str) -> list[Object] | None:
    """Place two objects along the relation's axis with at most 5 pixels between their other coordinates."""
    for _ in range(200):
        x, y = rng.uniform(7, SIDE - 7, 2)
        x2, y2 = rng.uniform(7, SIDE - 7, 2)
        if relation in ("left", "right"):
            y2 = y + rng.uniform(-5, 5)
        else:
            x2 = x + rng.uniform(-5, 5)
        first, second = items[0].at(x, y), items[1].at(x2, y2)
        if relation_between(x - x2, y - y2) == relation and fits(first, []) and fits(second, [first], gap=4.0):
            return [first, second]
    return None


def compose(rng: np.random.Generator, specs: list[tuple[str, str, str]], relation: str | None) -> list[Object] | None:
    """Place objects given as (shape, colour, size); the first of two stands in `relation` to the second.

    None where there was no room, which is rare: try again.
    """
    items = [_draw(rng, *spec) for spec in specs]
    if relation:
        return _place_pair(rng, items, relation)
    placed: list[Object] = []
    for item in items:
        moved = _place(rng, item, placed)
        if moved is None:
            return None
        placed.append(moved)
    return placed


def sample_scene(rng: np.random.Generator, kind: str | None = None, stray: bool = False) -> Scene:
    """Draw a random scene of `kind` (at random by `KINDS` when None), with a stray object when asked.

    In pairs and triples no two objects share a colour or a shape, so that every stated attribute is
    decidable from the image alone.
    """
    if kind is None:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    elif kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    while True:
        relation = str(rng.choice(RELATIONS)) if kind == "pair" else None
        number = {"single": 1, "pair": 2, "triple": 3}.get(kind) or int(rng.integers(2, 4))
        if kind == "count":
            specs = [_draw_spec(rng)] * number
        else:
            shapes, colours = (rng.choice(list(names), number, replace=False) for names in (SHAPES, COLOURS))
            sizes = rng.choice(list(RADII), number)
            specs = [(str(a), str(b), str(c)) for a, b, c in zip(shapes, colours, sizes, strict=True)]
        placed = compose(rng, specs, relation)
        if placed is None:
            continue
        if stray:
            extra = _draw(rng, str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), "small")
            spot = _place(rng, extra, placed)
            if spot is None:
                continue
            placed.append(spot)
        background = str(rng.choice(list(BACKGROUNDS)))
        return Scene(kind, background, tuple(placed), relation, stray=int(stray))


def degrade(pixels: np.ndarray, rng: np.random.Generator, how: str | None = None) -> np.ndarray:
    """Lower an image's quality and change nothing else: blur, fade or mottle (at random when None).

    Args:
        pixels: float [64, 64, 3] in [0, 1].
        how: blur (Gaussian, sigma 1.3-2 px), fade (contrast x 0.5-0.7 around mid gray), mottle (smooth
            brightness noise with a standard deviation of 0.05-0.12).
    """
    how = how or str(rng.choice(DEGRADATIONS))
    if how == "blur":
        sigma = rng.uniform(1.3, 2.0)
        return gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest").astype(np.float32)
    if how == "fade":
        return (0.5 + (pixels - 0.5) * rng.uniform(0.5, 0.7)).astype(np.float32)
    if how == "mottle":
        noise = gaussian_filter(rng.standard_normal((SIDE, SIDE)), 2.0, mode="wrap")
        noise *= rng.uniform(0.05, 0.12) / noise.std()
        # Pulled in from the limits first, else white and black would hide half of the noise.
        return np.clip(0.5 + (pixels - 0.5) * 0.9 + noise[..., None], 0.0, 1.0).astype(np.float32)
    raise ValueError(f"unknown degradation {how!r}; the choices are {', '.join(DEGRADATIONS)}")


def maybe_degrade(pixels: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """The image, degraded with this probability."""
    return degrade(pixels, rng) if rng.random() < probability else pixels


def choose_other(rng: np.random.Generator, choices: Iterable[str], *excluded: str | None) -> str:
    """A random one of the choices that are not excluded."""
    return str(rng.choice([choice for choice in choices if choice not in excluded]))
