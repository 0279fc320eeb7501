"""Clips in segments of some seconds, each judged on its own, and the latent frames that lie in them.

Segment s has the frames that begin at s * seconds or later, and before (s + 1) * seconds; frame i begins at i / fps.
There are as many as have frames, and the last may be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from t2i_align.data.schema import Group

ROUNDING = 1e-6  # segments; a frame that begins a segment must not fall short of it by float arithmetic


def segments(frames: int, fps: float, seconds: float) -> list[range]:
    """The frames of each segment of a clip."""
    count = math.floor((frames - 1) / fps / seconds + ROUNDING) + 1
    starts = [math.ceil(s * seconds * fps - ROUNDING) for s in range(count)]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], frames], strict=True)]


def latent_segments(times: Sequence[float], seconds: float) -> list[int]:
    """The segment of each latent frame: where most of its frames lie, or the earlier of two with equally many.

    Which latent frames a second covers is printed nowhere (arXiv 2506.03517); this is our choice. A latent frame that
    lies in several segments is counted once, so that a boundary moves by less than half a latent frame.

    Args:
        times: of the latent frames, in seconds (`VideoPipeline.latent_times`): the mean of their frames' beginnings.
        seconds: of a segment.
    """
    return [math.floor(time / seconds + ROUNDING) for time in times]


def unlabelled(group: Group, times: Sequence[float]) -> str:
    """Why a group's segment scores do not serve latent frames at these times, or ""."""
    if group.segment_seconds is None or group.segment_seconds <= 0:
        return f"segment_scores without segment_seconds above 0, found {group.segment_seconds!r}"
    found, needed = len(group.segment_scores[0]), latent_segments(times, group.segment_seconds)[-1] + 1
    seconds = f"{group.segment_seconds:g} s"
    return f"segment_scores of {found} segments of {seconds}; its frames lie in {needed}" if found < needed else ""


def by_latent_frame(columns: Mapping[str, Any], times: Sequence[float]) -> dict[str, Any]:
    """The columns of a batch, [B] each, with `segment_scores` as a tensor [B, k, f]: a number for each latent frame."""
    rows = zip(columns["segment_scores"], columns["segment_seconds"], strict=True)
    scores = [[[one[s] for s in latent_segments(times, seconds)] for one in group] for group, seconds in rows]
    return {**columns, "segment_scores": torch.tensor(scores)}
