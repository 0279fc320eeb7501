"""The worlds of images, of clips and of long captions: what each draws, its captions, its oracle, and its prompts.

Prompts are split by a hash of their canonical statement, so two phrasings of one statement never fall into two splits,
and pretraining can leave the statements of dev and test out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_align.testbed import captions, clips, long_captions
from t2i_align.testbed.clip_oracle import ClipOracle
from t2i_align.testbed.long_oracle import LongOracle
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import sample_scene

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Scenes or clips, and statements about them.

    Attributes:
        sample: draws a random scene or clip from a generator.
        language: module with `describe` (scene to statement), `write` (statement to caption) and `parse` (back).
        prefix: of the names of its splits.
        sizes: number of prompts in each split.
        seed: of the prompts.
        stated: how often the prompts state what may be left out, as `describe` takes it.
    """

    sample: Callable[..., Any]
    language: Any
    oracle: type[Oracle]
    prefix: str
    sizes: tuple[int, int, int]
    seed: int
    stated: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"p_size": 0.6, "p_background": 0.8}, hash=False
    )


IMAGES = World(sample=sample_scene, language=captions, oracle=Oracle, prefix="", sizes=(4096, 320, 640), seed=2024)
CLIPS = World(
    sample=clips.sample_clip, language=clips, oracle=ClipOracle, prefix="video-", sizes=(2048, 160, 320), seed=2025
)
LONG = World(
    sample=long_captions.sample, language=long_captions, oracle=LongOracle, prefix="long-", sizes=(2048, 160, 320),
    seed=2026, stated={},
)  # fmt: skip
# "train" (pairs and training), "dev" (tuning), "test" (final figures only), and the same for clips and long captions
PROMPTS = {f"{world.prefix}{split}": (world, split) for world in (IMAGES, CLIPS, LONG) for split in SPLITS}


def split_of(statement: Any) -> str:
    """The split of a statement about an image or a clip: about 7 % dev, 14 % test, the rest train."""
    digest = hashlib.sha256(repr(statement.canonical()).encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 2**32
    return "dev" if share < 0.07 else "test" if share < 0.21 else "train"


def draw_statement(world: World, rng: np.random.Generator, split: str = "train") -> Any:
    """A random true statement of a split, about a scene or clip that is not kept."""
    while True:
        statement = world.language.describe(world.sample(rng), rng, **world.stated)
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
def _prompts(name: str) -> tuple[str, ...]:
    file = ASSETS / f"prompts_{name}.txt"
    if file.exists():
        return tuple(file.read_text(encoding="utf-8").split("\n")[:-1])
    world, split = PROMPTS[name]
    return tuple(make_prompts(world, split, world.sizes[SPLITS.index(split)]))


def prompts(split: str) -> list[str]:
    """Prompts of one of the splits `PROMPTS`, always the same.

    "dev" and "test" are text files in the package; the others are drawn anew.

    Raises:
        ValueError: an unknown split.
    """
    if split not in PROMPTS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(PROMPTS)}")
    return list(_prompts(split))
