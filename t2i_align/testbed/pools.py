"""Pools of drawn pictures and their cached latents, from which the denoiser learns."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from t2i_align.testbed.scenes import Scene, degrade, render, sample_scene, to_uint8
from t2i_align.testbed.vae import encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many pictures, the share of them degraded, and the share with a stray object."""

    number: int
    degraded: float = 0.0
    stray: float = 0.0
    seed: int = 0


CLEAN = PoolConfig(number=50_000, seed=1)
FAULTY = PoolConfig(number=20_000, degraded=0.6, stray=0.3, seed=2)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Scenes and their scaled latents [N, 4, 16, 16] in half precision."""

    scenes: list[Scene]
    latents: Tensor

    @functools.cached_property
    def large(self) -> np.ndarray:
        """Whether a scene holds large objects only, [N]."""
        return np.array([all(item.size == "large" for item in scene.objects) for scene in self.scenes])

    def draw(self, rng: np.random.Generator, count: int, large_weight: float) -> np.ndarray:
        """`count` random scene numbers; scenes of large objects only are `large_weight` times as likely."""
        weights = np.cumsum(np.where(self.large, large_weight, 1.0))
        return np.searchsorted(weights, rng.random(count) * weights[-1], side="right")


def draw_scenes(config: PoolConfig) -> list[Scene]:
    """The pool's scenes; they depend on the configuration only."""
    rng = np.random.default_rng((config.seed, 0))
    return [sample_scene(rng, stray=bool(rng.random() < config.stray)) for _ in range(config.number)]


def _key(config: PoolConfig, vae: AutoencoderKL) -> str:
    """What the latents of a pool depend on: its configuration and the autoencoder's weights."""
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_pool(config: PoolConfig, vae: AutoencoderKL, cache: Path) -> Pool:
    """Draw a pool, and encode it unless `cache` (a .pt file) already holds its latents.

    Raises:
        ValueError: `cache` is of another configuration or autoencoder.
    """
    scenes, key = draw_scenes(config), _key(config, vae)
    if cache.exists():
        saved = torch.load(cache, weights_only=True)
        if saved["key"] != key:
            raise ValueError(f"{cache} was made by another autoencoder or PoolConfig; delete it to make it anew")
        return Pool(scenes, saved["latents"])
    vae = vae.to(memory_format=torch.channels_last)
    rng, parts = np.random.default_rng((config.seed, 1)), []
    for start in range(0, len(scenes), 2000):
        pictures = []
        for scene in scenes[start : start + 2000]:
            pixels = render(scene)
            pictures.append(to_uint8(degrade(pixels, rng) if rng.random() < config.degraded else pixels))
        parts.append((encode(vae, np.stack(pictures), bf16=True) * vae.config.scaling_factor).half())
        print(f"latents {start + len(pictures)}/{len(scenes)}", flush=True)
    latents = torch.cat(parts)
    torch.save({"key": key, "latents": latents}, cache.with_suffix(".tmp"))
    cache.with_suffix(".tmp").replace(cache)
    return Pool(scenes, latents)
