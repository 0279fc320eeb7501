"""What a base is trained with: the protocol that the image base (`sd.py`) and the video base (`wan.py`) fill in."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines import ForwardProcess
from t2i_align.testbed.world import World
from tools.testbed.networks import BASES, build


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAERecipe:
    """How an autoencoder is trained. phases: (steps, samples a step, frames, side of the crops in pixels)."""

    phases: tuple[tuple[int, int, int, int], ...]
    lr: float
    muon: bool
    number: int  # drawn samples to learn from
    faulty: float
    degraded: float
    kl_weight: float = 1e-6
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(phase[0] for phase in self.phases)

    def scaled(self, steps: int, first: int | None = None) -> VAERecipe:
        """The same recipe in so many steps, rounded up in each phase; `first` of them in the first phase."""
        start, *rest = self.phases
        number = math.ceil(start[0] * steps / self.steps) if first is None else first
        share = (steps - number) / (self.steps - start[0])
        phases = ((number, *start[1:]), *((math.ceil(phase[0] * share), *phase[1:]) for phase in rest))
        return dataclasses.replace(self, phases=phases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """How many images or clips a denoiser learns from, and the shares of them with drawn faults and degraded."""

    number: int
    faulty: float = 0.0
    degraded: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserRecipe:
    """How a denoiser is trained with its text encoder, in two phases under one cosine.

    First true captions and mostly clean images, so that the base *knows* its world. Then faults: captions with
    independent planted errors, degraded images, stray objects. The base ends as a mixture around what it knows, which
    is what preference alignment can sharpen.
    """

    steps: int
    clean_fraction: float
    lr: float
    muon: bool = False
    batch: int = 64
    caption_dropout: float = 0.1
    parse_weight: float = 0.1
    faulty_images: tuple[float, float]  # share of the batch, in each phase
    fault_rates: Mapping[str, float]  # each is planted on its own with this probability wherever it applies
    # Shapes are decided between noise and image, where the loss is small against the noisy steps' irreducible one:
    # this share of the times is logit-normal around `middle`, the rest uniform.
    middle_share: float = 0.7
    middle: tuple[float, float]
    noisiest_share: float = 0.0  # of the times in the noisiest twentieth, where backgrounds are decided
    # Images of large objects only are drawn so many times as often: a shape's word is learned from them first, since a
    # small shape is three latent pixels wide.
    large_weight: float = 3.0
    seed: int = 0


class Base(ABC):
    """A tiny base model in the making. Samples are uint8 [F, 64, 64, 3]; an image has one frame.

    Attributes:
        name: of its networks and recipes in `bases.yaml`.
        world: what it draws, its captions and its oracle.
        corrupt: a statement with one attribute wrong, or None where the fault does not apply.
        text_steps: steps of the text encoder's warm-up.
        continuous: whether times between the 1000 timesteps are drawn.
        bf16: whether autoencoder and denoiser are trained in bf16 where the CPU has it.
        parse_sizes: classes that are read off each of the P tokens of `encode_text`.
        process: how its latents become noise.
    """

    name: str
    world: World
    corrupt: Callable[..., Any]
    text_steps: int
    continuous: bool
    bf16: bool
    parse_sizes: Sequence[tuple[int, ...]]
    tokenizer: Any
    process: ForwardProcess

    def __init__(self) -> None:
        recipes = BASES[self.name]["recipes"]
        self.vae_recipe, self.recipe = VAERecipe(**recipes["vae"]), DenoiserRecipe(**recipes["denoiser"])
        self.clean, self.faulty = PoolConfig(**recipes["clean"]), PoolConfig(**recipes["faulty"])

    # What it learns from ----------------------------------------------------------------------------------------

    @abstractmethod
    def draw(self, rng: np.random.Generator, faulty: float) -> Any:
        """A random scene or clip."""

    @abstractmethod
    def render(self, drawn: Any, rng: np.random.Generator, faulty: float, degraded: float) -> np.ndarray:
        """Its pixels; `faulty` and `degraded` are probabilities."""

    @abstractmethod
    def centre(self, drawn: Any, rng: np.random.Generator) -> Sequence[float]:
        """(x, y) in pixels of what a crop should show."""

    # Its networks, with fresh weights ---------------------------------------------------------------------------

    def build_vae(self) -> Any:
        return build(self.name, "vae")

    def build_text_encoder(self) -> Any:
        return build(self.name, "text_encoder", self.tokenizer)

    def build_denoiser(self) -> Any:
        """Called as denoiser(noisy latents, timesteps, hidden text, return_dict=False)."""
        return build(self.name, "denoiser")

    @abstractmethod
    def assemble(self, vae: Any, text_encoder: Any, denoiser: Any) -> DiffusionPipeline:
        """The genuine diffusers pipeline around trained networks."""

    # How they are trained ---------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1], not clamped: a clamped, overshooting object would get no gradient."""

    @abstractmethod
    def reconstruction(self, error: Tensor, pixels: Tensor, progress: float) -> dict[str, Tensor]:
        """Named losses of decoded minus true pixels; progress from 0 to 1."""

    @abstractmethod
    def finish(self, vae: Any, samples: np.ndarray) -> None:
        """Change the latents' basis, in place, to one in which noise hides colours and shapes as late as possible."""

    @abstractmethod
    def encode_text(self, encoder: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        """What the denoiser attends to [B, L, D], and the tokens [B, P, D] that the parse heads read."""

    @abstractmethod
    def parse_targets(self, statement: Any) -> list[int]:
        """The true class of each of `parse_sizes`, whatever the phrasing."""


def to_pixels(samples: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] to what autoencoders take, in [-1, 1]: clips [B, 3, F, H, W], images [B, 3, H, W]."""
    pixels = torch.from_numpy(samples).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    return pixels if pixels.shape[2] > 1 else pixels[:, :, 0].contiguous(memory_format=torch.channels_last)


def class_of(value: str | None, choices: Sequence[str]) -> int:
    """1, 2, ... for a stated value, 0 for None."""
    return 0 if value is None else list(choices).index(value) + 1


class ClassHeads(nn.Module):
    """Reads classes off tokens, such as what a caption states; used in training only.

    Args:
        sizes: numbers of the classes that are read off each token; equal tokens share a head.
        width: of a token.
    """

    def __init__(self, sizes: Sequence[tuple[int, ...]], width: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.heads = nn.ModuleDict({str(token): nn.Linear(width, sum(token)) for token in sizes})

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over all that is read; tokens [B, P, D], targets [B, what is read off all tokens]."""
        logits: list[Tensor] = []
        for sizes, token in zip(self.sizes, tokens.float().unbind(1), strict=True):
            logits += self.heads[str(sizes)](token).split(sizes, dim=-1)
        terms = [F.cross_entropy(logit, target) for logit, target in zip(logits, targets.unbind(1), strict=True)]
        return torch.stack(terms).mean()
