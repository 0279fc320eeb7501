"""The drawn world in motion: clips of nine frames in which one shape follows a path, another may stand by.

A clip is fully described by its movers and its background, as a scene is. Its captions state objects, paths, speeds and
background; renaming a class or a field of `ClipStatement` moves prompts between splits, as it does for images.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from t2i_align.testbed.captions import NOUN, CaptionError, Phrase, clean, noun_words, read_noun
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, SIDE, Object, Scene, box_gap

FRAMES = 9
# Pixels a frame along the path; the gap between the ranges keeps the words decidable on generated clips.
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (1.2, 1.6), "quickly": (3.2, 4.0)}
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
TURNS = {"clockwise": 1, "anticlockwise": -1}
BOUNCES: dict[str, tuple[int, int]] = {"sideways": (1, 0), "vertically": (0, 1)}
PATHS = {  # with their shares among movers
    **dict.fromkeys(DIRECTIONS, 0.13),
    **dict.fromkeys(TURNS, 0.08),
    **dict.fromkeys(BOUNCES, 0.09),
    "still": 0.14,
}
PAIRS = 0.2  # share of clips in which a second object stands by
CIRCLE = (5.5, 6.5)  # radius in pixels of the path, small enough for a slow quarter turn to be seen as one


@dataclasses.dataclass(frozen=True)
class Mover:
    """One object; `item` is where it begins, `track` its centre in every frame (x, y in pixels); still: no `speed`."""

    item: Object
    path: str
    speed: str | None
    track: tuple[tuple[float, float], ...]

    def at(self, frame: int) -> Object:
        return self.item.at(*self.track[frame])


@dataclasses.dataclass(frozen=True)
class Clip:
    """A background and one or two movers that never touch; the second stands still."""

    background: str
    movers: tuple[Mover, ...]

    @property
    def objects(self) -> tuple[Object, ...]:
        """The objects where they begin."""
        return tuple(mover.item for mover in self.movers)

    @property
    def scenes(self) -> list[Scene]:
        """The frames; the kind of a scene plays no part in drawing."""
        kind = "single" if len(self.movers) == 1 else "pair"
        return [Scene(kind, self.background, tuple(m.at(f) for m in self.movers)) for f in range(FRAMES)]


def draw_offsets(path: str, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Offsets [9, 2] in pixels from where the path begins, `speed` pixels along it a frame (y points down)."""
    time = np.arange(FRAMES, dtype=float)
    if path == "still":
        return np.zeros((FRAMES, 2))
    if path in DIRECTIONS:
        return speed * time[:, None] * np.array(DIRECTIONS[path])
    if path in BOUNCES:  # there and back, turning in one of the middle frames
        turn = int(rng.integers(3, 6))
        there = rng.choice([-1, 1]) * (turn - np.abs(time - turn))
        return speed * there[:, None] * np.array(BOUNCES[path])
    if path in TURNS:
        radius = rng.uniform(*CIRCLE)
        angle = rng.uniform(0, 2 * np.pi) + TURNS[path] * speed * time / radius
        circle = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return circle - circle[0]
    raise ValueError(f"unknown path {path!r}; the paths are {', '.join(PATHS)}")


def _draw_mover(
    rng: np.random.Generator, shape: str, colour: str, size: str, path: str, speed: str | None
) -> Mover | None:
    """An object at a random place from which its whole path stays inside the frame; None where there is none."""
    offsets = draw_offsets(path, rng.uniform(*SPEEDS[speed]) if speed else 0.0, rng)
    item = Object(shape, colour, size, 0.0, 0.0, float(rng.uniform(*RADII[size])))
    left, top, right, bottom = item.box
    start = []
    for low, high, along in ((left, right, offsets[:, 0]), (top, bottom, offsets[:, 1])):
        first, last = 1.0 - low - along.min(), SIDE - 1.0 - high - along.max()
        if first > last:
            return None
        start.append(rng.uniform(first, last))
    item = item.at(*start)
    return Mover(item, path, speed, tuple((item.x + float(dx), item.y + float(dy)) for dx, dy in offsets))


def sample_clip(rng: np.random.Generator) -> Clip:
    """A random clip; two objects share neither colour nor shape, so that every stated attribute is decidable."""
    while True:
        number = 2 if rng.random() < PAIRS else 1
        shapes, colours = rng.choice(SHAPES, number, replace=False), rng.choice(list(COLOURS), number, replace=False)
        paths = [str(rng.choice(list(PATHS), p=list(PATHS.values()))), "still"][:number]
        if number == 2 and paths[0] == "still":
            continue
        specs = []
        for shape, colour, path in zip(shapes, colours, paths, strict=True):
            size = str(rng.choice(list(RADII)))
            speed = None if path == "still" else str(rng.choice(list(SPEEDS)))
            specs.append((str(shape), str(colour), size, path, speed))
        background = str(rng.choice(list(BACKGROUNDS)))
        for _ in range(200):  # two large objects and a long path may never fit
            movers = [mover for spec in specs if (mover := _draw_mover(rng, *spec))]
            clip = Clip(background, tuple(movers))
            if len(movers) == number and (number == 1 or all(box_gap(*scene.objects) >= 3.0 for scene in clip.scenes)):
                return clip


# Captions ----------------------------------------------------------------------------------------------------------

WAYS = {  # verb and direction of each path; the speed's word stands between them
    "right": ("moving", "to the right"),
    "left": ("moving", "to the left"),
    "up": ("moving", "upwards"),
    "down": ("moving", "downwards"),
    "clockwise": ("circling", "clockwise"),
    "anticlockwise": ("circling", "anticlockwise"),
    "sideways": ("bouncing", "from side to side"),
    "vertically": ("bouncing", "up and down"),
    "still": ("standing", "still"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One object and its path (`clips.PATHS`); `speed` None where it stands still or the caption leaves it open."""

    phrase: Phrase
    path: str
    speed: str | None = None


@dataclasses.dataclass(frozen=True)
class ClipStatement:
    """What a caption states of a clip; `background` None: not stated."""

    parts: tuple[Part, ...]
    background: str | None = None

    def canonical(self) -> ClipStatement:
        """The same statement whatever its phrasing: what moves comes first."""
        return dataclasses.replace(self, parts=tuple(sorted(self.parts, key=lambda p: (p.path == "still", repr(p)))))


def describe(
    clip: Clip, rng: np.random.Generator, *, p_size: float = 0.6, p_speed: float = 0.8, p_background: float = 0.8
) -> ClipStatement:
    """A true statement about a clip that leaves out some sizes, speeds and backgrounds."""
    parts = []
    for mover in clip.movers:
        size = mover.item.size if rng.random() < p_size else None
        speed = mover.speed if rng.random() < p_speed else None
        parts.append(Part(Phrase(mover.item.shape, mover.item.colour, size), mover.path, speed))
    return ClipStatement(tuple(parts), clip.background if rng.random() < p_background else None)


def _motion(path: str, speed: str | None) -> str:
    verb, way = WAYS[path]
    return f"{verb} {speed} {way}" if speed else f"{verb} {way}"


MOTIONS = {
    _motion(path, speed): (path, speed)
    for path in WAYS
    for speed in (None, *SPEEDS)
    if speed is None or path != "still"
}
_PART = rf"({NOUN}) ({'|'.join(MOTIONS)})"
_CAPTION = re.compile(
    rf"(?:on an? (?P<first>{'|'.join(BACKGROUNDS)}) background, )?{_PART}(?: and {_PART})?"
    rf"(?: on an? (?P<last>{'|'.join(BACKGROUNDS)}) background)?"
)


def write(statement: ClipStatement, rng: np.random.Generator) -> str:
    """Phrase a statement: two objects in any order, the background first or last."""
    parts = [f"{noun_words(part.phrase)} {_motion(part.path, part.speed)}" for part in statement.parts]
    text = " and ".join(str(part) for part in rng.permutation(parts))
    if statement.background is None:
        return text
    place = f"on a {statement.background} background"
    return f"{place}, {text}" if rng.random() < 0.5 else f"{text} {place}"


def parse(caption: str) -> ClipStatement:
    """Read a caption back into what it states, in canonical order.

    Raises:
        CaptionError: the caption is no sentence about this world's clips; quotes it and gives an example.
    """
    match = _CAPTION.fullmatch(clean(caption))
    if match is None or (match["first"] and match["last"]) or re.search(r"\b(two|three) ", caption.lower()):
        raise CaptionError(
            f"cannot read the prompt {caption!r}: the testbed's video captions are such as "
            "'a large red circle moving quickly to the right on a white background'"
        )
    parts = [Part(read_noun(match[i]), *MOTIONS[match[i + 1]]) for i in (2, 4) if match[i]]
    return ClipStatement(tuple(parts), match["first"] or match["last"]).canonical()
