"""What a base is trained with: the protocol that the image base (`sd.py`) and the video base (`wan.py`) fill in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines import ForwardProcess
from t2i_align.testbed.scenes import Scene
from t2i_align.testbed.world import World
from t2i_align.utils import settings as typed
from t2i_align.utils.settings import Bool, Count, Float, NonNegative, Positive, Share, Whole, settings
from tools.testbed.networks import BASES, build


@settings
class VAERecipe:
    """How an autoencoder is trained. phases: (steps, samples a step, frames, side of the crops in pixels)."""

    phases: tuple[tuple[Count, Count, Count, Count], ...]
    lr: Positive
    muon: Bool
    number: Count  # drawn samples to learn from
    faulty: Share
    degraded: Share
    kl_weight: NonNegative = 1e-6
    compile: Bool = False


@settings
class PoolRecipe:
    """How many images or clips a denoiser learns from, and the shares of them with drawn faults and degraded."""

    number: Count
    faulty: Share = 0.0
    degraded: Share = 0.0
    seed: Whole


@settings
class DenoiserRecipe:
    """How a denoiser is trained with its text encoder, in two phases under one cosine.

    First true captions and mostly clean images, so that the base *knows* its world. Then faults: captions with
    independent planted errors, degraded images, stray objects. The base ends as a mixture around what it knows, which
    is what preference alignment can sharpen.
    """

    steps: Whole
    clean_fraction: Share
    lr: Positive
    muon: Bool = False
    batch: Count = 64
    caption_dropout: Share = 0.1
    parse_weight: NonNegative = 0.1
    faulty_images: tuple[Share, Share]  # share of the batch, in each phase
    fault_rates: dict[str, Share]  # each is planted on its own with this probability wherever it applies
    # Shapes are decided between noise and image, where the loss is small against the noisy steps' irreducible one:
    # this share of the times is logit-normal around `middle`, the rest uniform.
    middle_share: Share = 0.7
    middle: tuple[Float, Positive]
    noisiest_share: Share = 0.0  # of the times in the noisiest twentieth, where backgrounds are decided
    # Images of large objects only are drawn so many times as often: a shape's word is learned from them first, since a
    # small shape is three latent pixels wide.
    large_weight: Positive = 3.0
    # How many times as much an object's latents count as the background's, besides once, where there is no noise; in
    # proportion to what is not noise elsewhere.
    object_weight: NonNegative = 0.0
    # Of scenes with long captions, a further batch's size as a share of `batch`; they are encoded in segments.
    long_share: Share = 0.0
    # Of the teacher in `distill`: above 1 the student learns in one pass what guidance does in two (arXiv 2210.03142).
    guidance: Positive = 1.0
    # In `distill`, the student's captions alone get the faults, and faulty images are learned from as they are: what a
    # teacher knows stays as sharp as it is, which training on images blurs.
    plant: Bool = False
    # In `distill`, of a transformer's tokens, from which the teacher's features at the same places are read (arXiv
    # 2410.06940): a shape is a few latents, of which the loss of predictions says little for thousands of steps.
    feature_weight: NonNegative = 0.0
    compile: Bool = False  # the denoiser: minutes at first, then about two thirds of a transformer's time
    stills: Bool = False  # the first latent frame of clips only: shapes are learned there, in a third of the time


@settings
class Recipe:
    """How a base is trained; `text_steps` of its text encoder's warm-up.

    `easy` is the share of scenes or clips with one object, large and on the latents' grid, from which shapes are
    learned first; the others are any. A denoiser's checkpoints lie `every` steps apart, and each is evaluated on the
    first `evaluated` dev prompts.
    """

    vae: VAERecipe
    clean: PoolRecipe
    faulty: PoolRecipe
    text_steps: Whole
    denoiser: DenoiserRecipe
    every: Count
    easy: Share = 0.0
    evaluated: Count = 64
    seed: Whole = 0


class Base(ABC):
    """A tiny base model in the making. Samples are uint8 [F, 64, 64, 3]; an image has one frame.

    Attributes:
        name: of its networks and recipes in `bases.yaml`.
        world: what it draws, its captions and its oracle.
        corrupt: a statement with one attribute wrong, or None where the fault does not apply.
        continuous: whether times between the 1000 timesteps are drawn.
        bf16: whether its autoencoder is trained in bf16 where the CPU has it; its denoiser always is.
        parse_sizes: classes that are read off each of the P tokens of `encode_text`.
        process: how its latents become noise.
    """

    name: str
    world: World
    corrupt: Callable[..., Any]
    continuous: bool
    bf16: bool
    parse_sizes: Sequence[tuple[int, ...]]
    tokenizer: Any
    process: ForwardProcess

    def __init__(self, overrides: Sequence[str] = (), recipe: str | None = None) -> None:
        """With the recipe of its own or another name in `bases.yaml`, changed by `key=value` overrides.

        Raises:
            UserError: an override that cannot be used.
        """
        self.recipe = typed.build(Recipe, typed.with_overrides(BASES[recipe or self.name]["recipe"], overrides))

    # What it learns from ----------------------------------------------------------------------------------------

    def draw(self, rng: np.random.Generator, faulty: float) -> Any:
        """A random scene or clip; `faulty` is the probability of a drawn fault where it is not an easy one."""
        easy = self.recipe.easy and rng.random() < self.recipe.easy
        return self.draw_easy(rng) if easy else self.draw_any(rng, faulty)

    @abstractmethod
    def draw_any(self, rng: np.random.Generator, faulty: float) -> Any:
        """Any scene or clip of its world."""

    @abstractmethod
    def draw_easy(self, rng: np.random.Generator) -> Any:
        """One of one large object of one size on the latents' grid, whose latents are the same wherever it is. Of
        objects anywhere a tiny transformer learned no shapes in this time."""

    @abstractmethod
    def render(self, drawn: Any, rng: np.random.Generator, faulty: float, degraded: float) -> np.ndarray:
        """Its pixels; `faulty` and `degraded` are probabilities."""

    @abstractmethod
    def centre(self, drawn: Any, rng: np.random.Generator) -> Sequence[float]:
        """(x, y) in pixels of what a crop should show."""

    @abstractmethod
    def latent_frames(self, drawn: Any) -> list[list[Scene]]:
        """The scenes that each frame of its latents stands for."""

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
