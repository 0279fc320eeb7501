"""Prompts of the world in motion, split by what they state as the image prompts are."""

from __future__ import annotations

import functools
from typing import get_args

import numpy as np

from t2i_align.testbed.prompts import Split, split_of
from t2i_align.testbed.video.captions import ClipStatement, describe, write
from t2i_align.testbed.video.motion import sample_clip

SIZES: dict[str, int] = {"train": 2048, "dev": 160, "test": 320}


@functools.cache
def make_prompts(split: Split) -> tuple[str, ...]:
    """Prompts of a split, no statement twice; always the same."""
    rng = np.random.default_rng((2025, get_args(Split).index(split)))
    seen: set[ClipStatement] = set()
    found: list[str] = []
    while len(found) < SIZES[split]:
        statement = describe(sample_clip(rng), rng)
        if split_of(statement) == split and statement.canonical() not in seen:
            seen.add(statement.canonical())
            found.append(write(statement, rng))
    return tuple(found)
