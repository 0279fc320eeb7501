"""The image base `testbed:sd`: a tiny Stable Diffusion that predicts v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from pipelines import VariancePreserving
from t2i_align.testbed.captions import CHOICES, Statement, corrupt
from t2i_align.testbed.scenes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    SIDE,
    Object,
    Scene,
    fits,
    maybe_degrade,
    render,
    sample_scene,
    to_uint8,
)
from t2i_align.testbed.world import IMAGES
from tools.testbed.base import Base, class_of
from tools.testbed.networks import build, build_tokenizer, to_ids
from tools.testbed.vae import posterior_statistics, spread_to

# Standard deviations that the latents' principal components are given, strongest first. Left alone, the background's
# brightness has 5 to 100 times the spread of what tells colours and shapes, which then drown in the noise that decides
# them; the last component hardly carries anything and stays small.
BALANCE = (1.2, 0.95, 0.75, 0.15)
CELL = 8  # pixels that a patch of SD3's is wide, two latents
SLOTS = 3  # objects that a caption can hold


class SD(Base):
    """Scenes of 64 x 64 pixels as 4 x 16 x 16 latents, a UNet and CLIP's text model."""

    name = "sd"
    world = IMAGES
    corrupt = staticmethod(corrupt)
    continuous = False
    bf16 = True
    # The last four tokens are always padding. Each of three holds one object, "first" being the left or the upper one
    # whatever the phrasing, so that cross-attention can bind them to places; the fourth holds the rest.
    parse_sizes = [tuple(len(choices) + 1 for choices in CHOICES.values())] * SLOTS + [(3, SLOTS, len(BACKGROUNDS) + 1)]

    def __init__(self, overrides: Sequence[str] = (), recipe: str | None = None) -> None:
        super().__init__(overrides, recipe)
        self.tokenizer: CLIPTokenizer = build_tokenizer()
        self.process = VariancePreserving(build("sd", "scheduler").alphas_cumprod, "v_prediction")

    def draw_any(self, rng: np.random.Generator, faulty: float) -> Scene:
        return sample_scene(rng, stray=bool(rng.random() < faulty))

    def draw_easy(self, rng: np.random.Generator) -> Scene:
        shape, colour, background = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, BACKGROUNDS))
        item = Object(shape, colour, "large", 0.0, 0.0, float(np.mean(RADII["large"])))
        places = [item.at(x, y) for x in range(0, SIDE, CELL) for y in range(0, SIDE, CELL)]
        inside = [place for place in places if fits(place, [], margin=0.0)]
        return Scene("single", background, (inside[rng.integers(len(inside))],))

    def render(self, drawn: Scene, rng: np.random.Generator, faulty: float, degraded: float) -> np.ndarray:
        return to_uint8(maybe_degrade(render(drawn), rng, degraded))[None]

    def centre(self, drawn: Scene, rng: np.random.Generator) -> Sequence[float]:
        item = drawn.objects[rng.integers(len(drawn.objects))]
        return item.x, item.y

    def latent_frames(self, drawn: Scene) -> list[list[Scene]]:
        return [[drawn]]

    def build_vae(self) -> AutoencoderKL:
        vae: AutoencoderKL = super().build_vae().to(memory_format=torch.channels_last)
        return vae

    def assemble(self, vae: Any, text_encoder: Any, denoiser: Any) -> StableDiffusionPipeline:
        """Without safety checker (the world holds nothing to check) or image encoder."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=denoiser,
            scheduler=build("sd", "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        decoded: Tensor = vae.decode(latents).sample
        return decoded

    def reconstruction(self, error: Tensor, pixels: Tensor, progress: float) -> dict[str, Tensor]:
        """L1, MSE, and L1 of the image gradients."""
        gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return {"error": error.abs().mean() + error.square().mean(), "gradients": gradients}

    def finish(self, vae: Any, samples: np.ndarray) -> None:
        spread_to(vae, *posterior_statistics(vae, samples), torch.tensor(BALANCE).double())

    def encode_text(self, encoder: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        hidden = encoder(to_ids(self.tokenizer, captions)).last_hidden_state
        return hidden, hidden[:, -4:]

    def parse_targets(self, statement: Statement) -> list[int]:
        """Colour, shape, size of each slot, then axis, count - 1, background; 0 is unstated."""
        if statement.relation in ("right", "below"):
            statement = statement.canonical()
        row = []
        for phrase in [*statement.phrases, *[None] * SLOTS][:SLOTS]:
            row += [class_of(getattr(phrase, name, None), choices) for name, choices in CHOICES.items()]
        axis = class_of(statement.relation, ("left", "above"))
        return [*row, axis, statement.count - 1, class_of(statement.background, tuple(BACKGROUNDS))]
