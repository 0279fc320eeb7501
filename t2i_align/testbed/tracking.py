"""Follow objects through the frames of a clip and name their paths and speeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from t2i_align.testbed.captions import Phrase
from t2i_align.testbed.clips import DIRECTIONS, SPEEDS
from t2i_align.testbed.oracle import assign, likeness
from t2i_align.testbed.vision import Seen, View

Track = Sequence[Seen | None]  # an object in every frame; None where it is not seen

MIN_FRAMES = 5  # fewer do not determine a path
# The geometric mean of the fastest slow and the slowest quick step, in pixels a frame.
SPEED_THRESHOLD = math.sqrt(SPEEDS["slowly"][1] * SPEEDS["quickly"][0])
STILL = 3.0  # pixels: what stays within is still; the shortest path of the world spans 4.8
JUMP = 3.5  # pixels by which a step exceeds the usual one
TURNING = 0.05  # area over squared length of the path: a circle's arcs have 0.08 to 0.16, straight ones 0


@dataclasses.dataclass(frozen=True)
class Motion:
    """How an object moves: names as in `clips` (None: none of them), and how far frames are off the path [F] (pixels).

    `jumps` is the distance by which a segment is displaced, `stutter` that by which a frame's steps differ from the
    usual step.
    """

    path: str | None
    speed: str | None
    jumps: np.ndarray
    stutter: np.ndarray


def follow(views: Sequence[View], phrases: Sequence[Phrase]) -> list[Track]:
    """The object of each phrase in every frame: what looks most as stated and is near to where it was."""
    frames: list[tuple[Seen | None, ...]] = []
    last: list[Seen | None] = [None] * len(phrases)

    def score(items: Sequence[Seen | None]) -> float:
        return sum(map(_likeness_here, phrases, items, last))

    for view in views:
        frames.append(assign(view.objects, len(phrases), 4, score))
        last[:] = [item or before for item, before in zip(frames[-1], last, strict=True)]
    return list(zip(*frames, strict=True))


def _likeness_here(phrase: Phrase, item: Seen | None, last: Seen | None) -> float:
    if item is None:
        return 0.0
    near = math.exp(-math.hypot(item.x - last.x, item.y - last.y) / 10.0) if last else 0.0
    return 0.1 + likeness(phrase, item) + near


def read_motion(track: Track) -> Motion:
    """Path and speed of a followed object, with jumps taken out first, so that they spoil the quality alone."""
    frames = np.array([f for f, item in enumerate(track) if item is not None])
    nothing = np.zeros(len(track))
    if len(frames) < MIN_FRAMES:
        return Motion(None, None, nothing, nothing)
    seen = np.array([(item.x, item.y) for item in track if item is not None])
    places = np.stack([np.interp(np.arange(len(track)), frames, seen[:, k]) for k in (0, 1)], axis=1)
    offsets = _offsets(places)
    places = places - offsets
    lengths = np.hypot(*np.diff(places, axis=0).T)
    stutter = np.abs(lengths - np.median(lengths))
    speed = "slowly" if lengths.mean() < SPEED_THRESHOLD else "quickly"
    path = _path(places, float(lengths.sum()))
    return Motion(
        path=path,
        speed=None if path == "still" else speed,
        jumps=np.hypot(*offsets.T),
        stutter=np.maximum(np.append(stutter, 0.0), np.insert(stutter, 0, 0.0)),
    )


def _offsets(places: np.ndarray) -> np.ndarray:
    """How far each frame's place [F, 2] is displaced by jumps; zero for the frames of most agreement."""
    steps = np.diff(places, axis=0)
    lengths = np.hypot(*steps.T)
    jumped = lengths > np.median(lengths) + JUMP
    if not jumped.any() or jumped.all():
        return np.zeros_like(places)
    usual = np.stack([np.interp(np.arange(len(steps)), np.flatnonzero(~jumped), steps[~jumped, k]) for k in (0, 1)], 1)
    offsets = np.insert(np.cumsum(np.where(jumped[:, None], steps - usual, 0.0), axis=0), 0, 0.0, axis=0)
    agreeing = np.hypot(*(offsets[:, None] - offsets[None]).transpose(2, 0, 1)) < JUMP
    return offsets - offsets[agreeing.sum(1).argmax()]


def _path(places: np.ndarray, length: float) -> str | None:
    """The name of the path through `places` [F, 2], which has `length` pixels."""
    apart = places[:, None] - places[None]
    if np.hypot(apart[..., 0], apart[..., 1]).max() < STILL:
        return "still"
    (x, y), (x2, y2) = places.T, np.roll(places, -1, axis=0).T
    turning = float((x * y2 - x2 * y).sum() / 2) / length**2  # y points down, hence clockwise is positive
    if abs(turning) > TURNING:
        return "clockwise" if turning > 0 else "anticlockwise"
    way, spread = places[-1] - places[0], np.ptp(places, axis=0)
    axis = int(spread.argmax())
    if spread[axis] < 1.5 * spread[1 - axis]:
        return None  # neither across nor along
    if abs(way[axis]) < 0.5 * length:
        return ("sideways", "vertically")[axis]
    return next(name for name, step in DIRECTIONS.items() if step[axis] == np.sign(way[axis]))
