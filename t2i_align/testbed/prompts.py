"""Prompts of the small world, split by what they state.

The split is a hash of the canonical statement, so two phrasings of one statement can never fall on two
sides, and the pretraining can leave the statements of dev and test out.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from t2i_align.testbed.captions import Statement, describe, write
from t2i_align.testbed.scenes import sample_scene

Split = Literal["train", "dev", "test"]
SIZES: dict[str, int] = {"train": 4096, "dev": 320, "test": 640}
ASSETS = Path(__file__).resolve().parent.parent / "assets"


class Canonical(Protocol):
    """A statement, of an image or of a clip."""

    def canonical(self) -> object: ...


def split_of(statement: Canonical) -> Split:
    """The split a statement belongs to: about 7 % dev, 14 % test, the rest train."""
    digest = hashlib.sha256(repr(statement.canonical()).encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    return "dev" if share < 0.07 else "test" if share < 0.21 else "train"


def make_prompts(split: Split, number: int) -> list[str]:
    """`number` prompts of a split, no statement twice, in the mix of kinds of `scenes.KINDS`."""
    rng = np.random.default_rng((2024, get_args(Split).index(split)))
    seen: set[Statement] = set()
    found: list[str] = []
    while len(found) < number:
        statement = describe(sample_scene(rng), rng, p_size=0.6, p_background=0.8)
        if split_of(statement) == split and statement.canonical() not in seen:
            seen.add(statement.canonical())
            found.append(write(statement, rng))
    return found


@functools.cache
def _read(split: str) -> tuple[str, ...]:
    path = ASSETS / f"prompts_{split}.txt"
    if path.exists():
        return tuple(path.read_text(encoding="utf-8").split("\n")[:-1])
    return tuple(make_prompts(split, SIZES[split]))  # type: ignore[arg-type]


def prompts(split: str) -> list[str]:
    """Prompts of a split: "train" (pairs and training), "dev" (tuning), "test" (final figures only).

    dev and test are text files in the package; train is made anew, always the same, and so are the prompts for clips:
    "video-train", "video-dev", "video-test".

    Raises:
        ValueError: an unknown split.
    """
    kind, _, name = split.rpartition("-")
    if name not in SIZES or kind not in ("", "video"):
        choices = [*SIZES, *(f"video-{name}" for name in SIZES)]
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(choices)}")
    if kind == "video":
        from t2i_align.testbed.video.prompts import make_prompts as make_video_prompts  # which needs this module

        return list(make_video_prompts(name))
    return list(_read(name))
