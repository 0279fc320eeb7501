"""The oracle for clips: is the clip what its prompt says, and is it well made in every frame?

It looks at each frame with the eyes of the image oracle, follows the stated objects through time, and reads their
paths and speeds. Faithfulness is the share of stated attributes that hold. A frame's quality is that of its image
times that of time: a smooth track, the same identity, no flicker; a clip's is the mean over its frames.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from t2i_align.testbed.oracle import check_weight, fall, grades, image_quality, to_images
from t2i_align.testbed.video.captions import ClipStatement, parse
from t2i_align.testbed.video.tracking import MIN_FRAMES, Motion, follow, read_motion
from t2i_align.testbed.vision import Seen, View, look

ATTRIBUTES = ("colour", "shape", "size", "path", "speed", "count", "background")
H = TypeVar("H", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class ClipVerdict:
    """Float arrays [B] in [0, 1]; an attribute is NaN where the prompt does not state it.

    `strict` is 1 where every stated attribute holds. `frames` [B, F] is each frame's quality, `image` x `temporal`
    [B, F] each; `quality` is its mean over the frames.
    """

    reward: np.ndarray
    faithfulness: np.ndarray
    strict: np.ndarray
    quality: np.ndarray
    attributes: dict[str, np.ndarray]
    image: np.ndarray
    temporal: np.ndarray

    @property
    def frames(self) -> np.ndarray:
        return self.image * self.temporal


class MotionOracle:
    """Judges clips against the video prompts of this world.

    Args:
        faithfulness_weight: share of faithfulness in the reward; quality has the rest.
    """

    version = "1.0"

    def __init__(self, faithfulness_weight: float = 0.6) -> None:
        self.faithfulness_weight = check_weight(faithfulness_weight)

    def judge(self, pixels: Tensor | np.ndarray, prompts: Sequence[str]) -> ClipVerdict:
        """Judge clips [B, F, 3, H, W] in [0, 1]; squares of another side are resized to 64.

        Raises:
            ValueError: wrong shape, values outside [0, 1] or not finite, fewer than five frames, or as many prompts
                as clips are not given.
            CaptionError: a prompt is not of this world.
        """
        if pixels.ndim != 5 or pixels.shape[1] < MIN_FRAMES:
            raise ValueError(
                f"pixels must be clips [B, F, 3, H, H] of {MIN_FRAMES} frames or more, not {tuple(pixels.shape)}"
            )
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} clips but {len(prompts)} prompts")
        statements = [parse(prompt) for prompt in prompts]
        number = pixels.shape[1]
        rows, image, temporal = [], [], []
        for clip, statement in zip(pixels, statements, strict=True):
            views = look(to_images(clip, number))
            tracks = follow(views, [part.phrase for part in statement.parts])
            motions = [read_motion(track) for track in tracks]
            rows.append(_check(views, tracks, motions, statement))
            image.append([image_quality(view) for view in views])
            temporal.append(_temporal(views, tracks, motions))
        images, times = (np.array(some, float).reshape(-1, number) for some in (image, temporal))
        common = grades(np.array(rows, float), ATTRIBUTES, (images * times).mean(axis=1), self.faithfulness_weight)
        return ClipVerdict(**common, image=images, temporal=times)


def _mode(values: Iterable[H]) -> H | None:
    """The most frequent value, the first of several; None without any."""
    found = Counter(values).most_common(1)
    return found[0][0] if found else None


def _check(
    views: Sequence[View], tracks: Sequence[Sequence[Seen | None]], motions: Sequence[Motion], statement: ClipStatement
) -> list[float]:
    """One value per `ATTRIBUTES`: the share of objects of which it holds in most frames, NaN where not stated."""
    held: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    for part, track, motion in zip(statement.parts, tracks, motions, strict=True):
        for name in ("colour", "shape", "size"):
            stated = getattr(part.phrase, name)
            if stated is not None:
                held[name].append(float(_mode(getattr(item, name) for item in track if item) == stated))
        held["path"].append(float(motion.path == part.path))
        if part.speed is not None:
            held["speed"].append(float(motion.speed == part.speed))
    held["count"].append(float(_mode(len(view.objects) for view in views) == len(statement.parts)))
    if statement.background is not None:
        held["background"].append(float(_mode(view.background for view in views) == statement.background))
    return [float(np.mean(values)) if values else np.nan for values in held.values()]


def _temporal(views: Sequence[View], tracks: Sequence[Sequence[Seen | None]], motions: Sequence[Motion]) -> np.ndarray:
    """Quality in time of each frame [F]: the objects' mean, halved where the background is another than usual."""
    objects = [
        [_steady(track, motion, f) for f in range(len(views))] for track, motion in zip(tracks, motions, strict=True)
    ]
    usual = _mode(view.background for view in views)
    return np.mean(objects, axis=0) * [1.0 if view.background == usual else 0.5 for view in views]


def _steady(track: Sequence[Seen | None], motion: Motion, frame: int) -> float:
    """Of one object in one frame: there, in its place, of its usual colour, shape and strength of colour."""
    item, seen = track[frame], [some for some in track if some]
    if item is None:
        return 0.0
    same = np.mean([getattr(item, name) == _mode(getattr(some, name) for some in seen) for name in ("colour", "shape")])
    flicker = abs(item.chroma - float(np.median([some.chroma for some in seen])))
    smooth = fall(motion.jumps[frame], 1.5, 6.0) * fall(motion.stutter[frame], 1.2, 4.0)
    return float(same) * smooth * fall(flicker, 0.15, 0.6)
