"""The two worlds, of images and of clips: what each draws, its captions, its oracle, and its prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from t2i_align.testbed import captions, clip_captions
from t2i_align.testbed.clip_oracle import ClipOracle
from t2i_align.testbed.clips import sample_clip
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import sample_scene


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Scenes or clips, and statements about them; random functions take a generator.

    Attributes:
        sample: draws a random scene or clip.
        describe, write, parse: scene to statement, statement to caption, caption to statement.
        sizes: number of prompts in each split.
        seed: of the prompts.
    """

    sample: Callable[..., Any]
    describe: Callable[..., Any]
    write: Callable[..., str]
    parse: Callable[[str], Any]
    oracle: type[Oracle]
    sizes: dict[str, int]
    seed: int


IMAGES = World(
    sample=sample_scene,
    describe=captions.describe,
    write=captions.write,
    parse=captions.parse,
    oracle=Oracle,
    sizes={"train": 4096, "dev": 320, "test": 640},
    seed=2024,
)
CLIPS = World(
    sample=sample_clip,
    describe=clip_captions.describe,
    write=clip_captions.write,
    parse=clip_captions.parse,
    oracle=ClipOracle,
    sizes={"train": 2048, "dev": 160, "test": 320},
    seed=2025,
)
