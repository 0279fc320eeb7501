"""Pools of drawn clips and their cached latents, from which the video denoiser learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from t2i_align.testbed.clips import FAULT_RATES, Clip, sample_clip, spoil, to_clip
from tools.testbed.pools import Pool, cached_latents
from tools.testbed.video.vae import encode, normalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipPoolConfig:
    """How many clips, the share of them degraded as images, and whether they have faults of time (`FAULT_RATES`)."""

    number: int
    degraded: float = 0.0
    faults: bool = False
    seed: int = 0


CLEAN = ClipPoolConfig(number=8_000, seed=1)
FAULTY = ClipPoolConfig(number=3_000, degraded=0.4, faults=True, seed=2)


def make_pool(config: ClipPoolConfig, vae: AutoencoderKLWan, cache: Path) -> Pool[Clip]:
    """Draw clips, and encode them to normalised latents [N, 16, 3, 8, 8] unless `cache` (a .pt file) holds these."""
    rng = np.random.default_rng((config.seed, 0))
    clips = [sample_clip(rng) for _ in range(config.number)]

    def make() -> Tensor:
        rng, parts = np.random.default_rng((config.seed, 1)), []
        for start in range(0, len(clips), 500):
            drawn = []
            for clip in clips[start : start + 500]:
                faulty = config.faults and rng.random() < FAULT_RATES[clip.movers[0].speed]
                scenes = spoil(clip, rng)[0] if faulty else clip.scenes
                drawn.append(to_clip(scenes, rng, degraded=bool(rng.random() < config.degraded)))
            parts.append(normalise(vae, encode(vae, np.stack(drawn))).half())
            print(f"latents {start + len(drawn)}/{len(clips)}", flush=True)
        return torch.cat(parts)

    return Pool(clips, cached_latents(config, vae, cache, make))
