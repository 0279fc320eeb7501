"""Prompts of the two worlds, split by what they state.

The split is a hash of the canonical statement, so two phrasings of one statement never fall into two splits, and
pretraining can leave the statements of dev and test out.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.testbed.world import CLIPS, IMAGES, World

SPLITS = ("train", "dev", "test")
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def split_of(statement: Any) -> str:
    """The split of a statement about an image or a clip: about 7 % dev, 14 % test, the rest train."""
    digest = hashlib.sha256(repr(statement.canonical()).encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    return "dev" if share < 0.07 else "test" if share < 0.21 else "train"


def draw_statement(world: World, rng: np.random.Generator, split: str = "train") -> Any:
    """A random true statement of a split, about a scene or clip that is not kept."""
    while True:
        statement = world.language.describe(world.sample(rng), rng, p_size=0.6, p_background=0.8)
        if split_of(statement) == split:
            return statement


def make_prompts(world: World, split: str, number: int) -> list[str]:
    """`number` prompts of a split, no statement twice; always the same."""
    rng = np.random.default_rng((world.seed, SPLITS.index(split)))
    texts: dict[Any, str] = {}
    while len(texts) < number:
        statement = draw_statement(world, rng, split)
        if statement.canonical() not in texts:
            texts[statement.canonical()] = world.language.write(statement, rng)
    return list(texts.values())


@functools.cache
def _read(split: str) -> tuple[str, ...]:
    path = ASSETS / f"prompts_{split}.txt"
    if path.exists():
        return tuple(path.read_text(encoding="utf-8").split("\n")[:-1])
    kind, _, name = split.rpartition("-")
    world = CLIPS if kind else IMAGES
    return tuple(make_prompts(world, name, world.sizes[name]))


def prompts(split: str) -> list[str]:
    """Prompts of a split: "train" (pairs and training), "dev" (tuning), "test" (final figures only).

    dev and test are text files in the package; train is made anew, always the same, and so are the prompts for clips:
    "video-train", "video-dev", "video-test".

    Raises:
        ValueError: an unknown split.
    """
    choices = (*SPLITS, *(f"video-{name}" for name in SPLITS))
    if split not in choices:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(choices)}")
    return list(_read(split))
