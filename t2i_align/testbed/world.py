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
    """Scenes or clips, and statements about them.

    Attributes:
        sample: draws a random scene or clip from a generator.
        language: module with `describe` (scene to statement), `write` (statement to caption) and `parse` (back).
        sizes: number of prompts in each split.
        seed: of the prompts.
    """

    sample: Callable[..., Any]
    language: Any
    oracle: type[Oracle]
    sizes: dict[str, int]
    seed: int


_IMAGE_SIZES, _CLIP_SIZES = {"train": 4096, "dev": 320, "test": 640}, {"train": 2048, "dev": 160, "test": 320}
IMAGES = World(sample=sample_scene, language=captions, oracle=Oracle, sizes=_IMAGE_SIZES, seed=2024)
CLIPS = World(sample=sample_clip, language=clip_captions, oracle=ClipOracle, sizes=_CLIP_SIZES, seed=2025)
