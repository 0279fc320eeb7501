"""Pools of drawn images or clips and their cached latents, from which the denoisers learn."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from t2i_align.testbed.scenes import Object, Scene, degrade, render, sample_scene, to_uint8
from tools.testbed.vae import encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many images, the share of them degraded, and the share with a stray object."""

    number: int
    degraded: float = 0.0
    stray: float = 0.0
    seed: int = 0


CLEAN = PoolConfig(number=50_000, seed=1)
FAULTY = PoolConfig(number=20_000, degraded=0.6, stray=0.3, seed=2)


class Drawn(Protocol):
    """A scene or a clip."""

    @property
    def objects(self) -> tuple[Object, ...]: ...


D = TypeVar("D", bound=Drawn)


@dataclasses.dataclass(frozen=True)
class Pool(Generic[D]):
    """Scenes or clips and their scaled latents [N, ...] in half precision."""

    drawn: list[D]
    latents: Tensor

    @functools.cached_property
    def large(self) -> np.ndarray:
        """Whether only large objects are in it, [N]."""
        return np.array([all(item.size == "large" for item in some.objects) for some in self.drawn])

    def draw(self, rng: np.random.Generator, count: int, large_weight: float) -> np.ndarray:
        """`count` random numbers of scenes; those of large objects only are `large_weight` times as likely."""
        weights = np.cumsum(np.where(self.large, large_weight, 1.0))
        return np.searchsorted(weights, rng.random(count) * weights[-1], side="right")


def draw_scenes(config: PoolConfig) -> list[Scene]:
    """The pool's scenes; they depend on the configuration only."""
    rng = np.random.default_rng((config.seed, 0))
    return [sample_scene(rng, stray=bool(rng.random() < config.stray)) for _ in range(config.number)]


def _key(config: object, vae: nn.Module) -> str:
    """What the latents of a pool depend on: its configuration and the autoencoder's weights."""
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_latents(config: object, vae: nn.Module, cache: Path, make: Callable[[], Tensor]) -> Tensor:
    """The latents that `cache` (a .pt file) holds, or those that `make` returns, which are then saved there.

    Raises:
        ValueError: `cache` is of another configuration or autoencoder.
    """
    key = _key(config, vae)
    if cache.exists():
        saved = torch.load(cache, weights_only=True)
        if saved["key"] != key:
            raise ValueError(f"{cache} was made by another autoencoder or PoolConfig; delete it to make it anew")
        return saved["latents"]
    latents = make()
    torch.save({"key": key, "latents": latents}, cache.with_suffix(".tmp"))
    cache.with_suffix(".tmp").replace(cache)
    return latents


def make_pool(config: PoolConfig, vae: AutoencoderKL, cache: Path) -> Pool[Scene]:
    """Draw a pool, and encode it unless `cache` (a .pt file) already holds its latents."""
    scenes = draw_scenes(config)

    def make() -> Tensor:
        fast = vae.to(memory_format=torch.channels_last)
        rng, parts = np.random.default_rng((config.seed, 1)), []
        for start in range(0, len(scenes), 2000):
            images = []
            for scene in scenes[start : start + 2000]:
                pixels = render(scene)
                images.append(to_uint8(degrade(pixels, rng) if rng.random() < config.degraded else pixels))
            parts.append((encode(fast, np.stack(images), bf16=True) * vae.config.scaling_factor).half())
            print(f"latents {start + len(images)}/{len(scenes)}", flush=True)
        return torch.cat(parts)

    return Pool(scenes, cached_latents(config, vae, cache, make))
