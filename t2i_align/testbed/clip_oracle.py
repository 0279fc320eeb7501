"""The oracle for clips: does the clip show what its prompt states, and is it well made in every frame?

It looks at each frame as the image oracle does, follows the stated objects through time, and reads their paths and
speeds. Faithfulness is the share of stated attributes that hold. A frame's quality is that of its image times that in
time (a smooth track, the same identity, no flicker); a clip's is the mean over its frames.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from t2i_align.testbed.captions import CHOICES
from t2i_align.testbed.clips import ClipStatement, parse
from t2i_align.testbed.oracle import Oracle, Verdict, fall, image_quality, shares, to_images
from t2i_align.testbed.tracking import MIN_FRAMES, Motion, Track, follow, read_motion
from t2i_align.testbed.vision import Seen, View, look


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipVerdict(Verdict):
    """A verdict on clips. `frames` [B, F] is each frame's quality, `image` x `temporal` [B, F] each; `quality` is its
    mean over the frames."""

    image: np.ndarray
    temporal: np.ndarray

    @property
    def frames(self) -> np.ndarray:
        return self.image * self.temporal

    def columns(self) -> dict[str, np.ndarray]:
        return {**super().columns(), "image": self.image.mean(1), "temporal": self.temporal.mean(1)}


class ClipOracle(Oracle):
    """Judges clips against the video prompts of this world."""

    attributes = ("colour", "shape", "size", "path", "speed", "count", "background")

    def judge(self, pixels: Tensor | np.ndarray, prompts: Sequence[str]) -> ClipVerdict:
        """Judge clips [B, F, 3, H, W] in [0, 1]; squares of another side are resized to 64.

        Raises:
            ValueError: wrong shape, values outside [0, 1] or not finite, fewer than five frames, or another number of
                prompts than clips.
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
        images, times = (np.array(values, float).reshape(-1, number) for values in (image, temporal))
        return ClipVerdict(**self._grades(rows, (images * times).mean(axis=1)), image=images, temporal=times)


def _mode(values: Iterable[Any]) -> Any:
    """The most frequent value, the first of several; None without any."""
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else None


def _check(
    views: Sequence[View], tracks: Sequence[Track], motions: Sequence[Motion], statement: ClipStatement
) -> list[float]:
    """One value per attribute: the share of objects of which it holds in most frames, NaN where not stated."""
    checks = [
        ("count", len(statement.parts), _mode(len(view.objects) for view in views)),
        ("background", statement.background, _mode(view.background for view in views)),
    ]
    for part, track, motion in zip(statement.parts, tracks, motions, strict=True):
        checks += [("path", part.path, motion.path), ("speed", part.speed, motion.speed)]
        checks += [(n, getattr(part.phrase, n), _mode(getattr(item, n) for item in track if item)) for n in CHOICES]
    return shares(ClipOracle.attributes, [(n, stated == seen) for n, stated, seen in checks if stated is not None])


def _temporal(views: Sequence[View], tracks: Sequence[Track], motions: Sequence[Motion]) -> np.ndarray:
    """Quality in time of each frame [F]: the objects' mean, halved where the background is another than usual."""
    objects = [_steadiness(track, motion) for track, motion in zip(tracks, motions, strict=True)]
    usual = _mode(view.background for view in views)
    return np.mean(objects, axis=0) * [1.0 if view.background == usual else 0.5 for view in views]


def _steadiness(track: Track, motion: Motion) -> list[float]:
    """Of one object in each frame: visible, in its place, of its usual colour, shape and strength of colour."""
    seen = [item for item in track if item]
    colour, shape = (_mode(getattr(item, name) for item in seen) for name in ("colour", "shape"))
    chroma = float(np.median([item.chroma for item in seen])) if seen else 0.0

    def steadiness(item: Seen | None, jump: float, stutter: float) -> float:
        if item is None:
            return 0.0
        same = ((item.colour == colour) + (item.shape == shape)) / 2
        smooth = fall(jump, 1.5, 6.0) * fall(stutter, 1.2, 4.0)
        return same * smooth * fall(abs(item.chroma - chroma), 0.15, 0.6)

    return [steadiness(*values) for values in zip(track, motion.jumps, motion.stutter, strict=True)]
