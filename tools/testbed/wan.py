"""The video base `testbed:wan`: a tiny Wan with Wan's own compression, trained as a rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.nn import functional as F

from pipelines import RectifiedFlow
from t2i_align.testbed.captions import CHOICES
from t2i_align.testbed.clips import (
    DIRECTIONS,
    FRAMES,
    PATHS,
    SPEEDS,
    Clip,
    ClipStatement,
    Mover,
    draw_offsets,
    sample_clip,
)
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, SIDE, Object, Scene
from t2i_align.testbed.world import CLIPS
from tools.testbed.base import Base, class_of
from tools.testbed.faults import FAULT_RATES, corrupt, spoil, to_clip
from tools.testbed.networks import build, build_word_tokenizer, clip_words, to_ids
from tools.testbed.vae import posterior_statistics, spread_to

CHANNELS = 16
EVENNESS = 0.4  # the power of its variance that a latent component keeps
OBJECT_WEIGHT = 8.0
CELL = 8  # pixels that a latent is wide
PACES = {"slowly": 1.5, "quickly": 4.0}  # pixels a frame


class Wan(Base):
    """Nine frames of 64 x 64 as 16 x 3 x 8 x 8 latents: four frames (the first alone) and 8 x 8 pixels each."""

    name = "wan"
    world = CLIPS
    corrupt = staticmethod(corrupt)
    continuous = True
    bf16 = False
    choices = (*CHOICES.values(), tuple(PATHS), tuple(SPEEDS))
    parse_sizes = [(*[len(names) + 1 for names in choices] * 2, len(BACKGROUNDS) + 1)]

    def __init__(self, overrides: Sequence[str] = (), recipe: str | None = None) -> None:
        super().__init__(overrides, recipe)
        self.tokenizer = build_word_tokenizer(clip_words())
        self.process = RectifiedFlow()

    def draw_any(self, rng: np.random.Generator, faulty: float) -> Clip:
        return sample_clip(rng)

    def draw_easy(self, rng: np.random.Generator) -> Clip:
        """It begins at a corner of the grid and goes straight, at one of two paces."""
        shape, colour, path, speed, background = (
            str(rng.choice(list(names))) for names in (SHAPES, COLOURS, DIRECTIONS, SPEEDS, BACKGROUNDS)
        )
        item = Object(shape, colour, "large", 0.0, 0.0, float(np.mean(RADII["large"])))
        offsets = draw_offsets(path, PACES[speed], rng)
        left, top, right, bottom = item.box
        start = []
        for low, high, along in ((left, right, offsets[:, 0]), (top, bottom, offsets[:, 1])):
            corners = np.arange(0.0, SIDE, CELL)
            inside = (corners + low + along.min() >= 0) & (corners + high + along.max() <= SIDE)
            start.append(float(rng.choice(corners[inside])))
        track = tuple((start[0] + float(dx), start[1] + float(dy)) for dx, dy in offsets)
        return Clip(background, (Mover(item.at(*start), path, speed, track),))

    def render(self, drawn: Clip, rng: np.random.Generator, faulty: float, degraded: float) -> np.ndarray:
        """`faulty` is relative to `faults.FAULT_RATES`, which depend on the speed."""
        spoilt = rng.random() < faulty * FAULT_RATES[drawn.movers[0].speed]
        scenes = spoil(drawn, rng)[0] if spoilt else drawn.scenes
        return to_clip(scenes, rng, degraded=bool(rng.random() < degraded))

    def centre(self, drawn: Clip, rng: np.random.Generator) -> Sequence[float]:
        """The middle of the motion."""
        return tuple(np.mean(drawn.movers[0].track, axis=0))

    def latent_frames(self, drawn: Clip) -> list[list[Scene]]:
        """The first frame, then four at a time."""
        scenes = drawn.scenes
        return [scenes[:1], *(scenes[i : i + 4] for i in range(1, FRAMES, 4))]

    def build_vae(self) -> AutoencoderKLWan:
        vae: AutoencoderKLWan = super().build_vae()
        with torch.no_grad():  # hardly any noise at first: with the usual one the objects drown for hundreds of steps
            vae.quant_conv.bias[CHANNELS:] = -6.0
        return vae

    def assemble(self, vae: Any, text_encoder: Any, denoiser: Any) -> WanPipeline:
        """The denoiser's configuration names the size of clips that it was made for."""
        denoiser.register_to_config(_default_size=(FRAMES, SIDE, SIDE))
        parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": self.tokenizer, "transformer": denoiser}
        return WanPipeline(**parts, scheduler=build("wan", "scheduler"))

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """`vae.decode` without its last clamp to [-1, 1]."""
        vae.clear_cache()
        hidden, frames = vae.post_quant_conv(latents), []
        for i in range(hidden.shape[2]):
            vae._conv_idx = [0]
            chunk = hidden[:, :, i : i + 1]
            frames.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
        vae.clear_cache()
        decoded: Tensor = unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)
        return decoded

    def reconstruction(self, error: Tensor, pixels: Tensor, progress: float) -> dict[str, Tensor]:
        """Huber's loss, on objects more than on the flat background at first; L1 of the gradients in space and time."""
        coloured = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) > 0.3).float()
        around = F.max_pool3d(coloured, (1, 3, 3), 1, (0, 1, 1))
        huber = F.huber_loss(error, torch.zeros_like(error), delta=0.2, reduction="none")
        weight = 1.0 + OBJECT_WEIGHT * (1.0 - progress) * around
        edges = torch.stack([error.diff(dim=d).abs().mean() for d in (2, 3, 4)]).sum()
        return {"huber": 5.0 * (weight * huber).mean(), "edges": progress * edges}

    def finish(self, vae: Any, samples: np.ndarray) -> None:
        """Wan normalises channel by channel, which would undo a spread. Hence a Hadamard matrix mixes the components
        into all channels alike, and each channel ends with the same standard deviation."""
        means, variance = posterior_statistics(vae, samples)
        values = torch.linalg.eigvalsh(torch.cov(means.T)).flip(0)
        rotation = torch.from_numpy(scipy.linalg.hadamard(CHANNELS) / CHANNELS**0.5)
        spread_to(vae, means, variance, values ** (EVENNESS / 2), rotation)
        latents = posterior_statistics(vae, samples)[0]
        vae.register_to_config(latents_mean=latents.mean(0).tolist(), latents_std=latents.std(0).tolist())

    def encode_text(self, encoder: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
        """What `WanPipeline` gives its denoiser [B, 24, 128], zero after the end-of-text token, and that token."""
        ids = to_ids(self.tokenizer, captions)
        mask = (ids != self.tokenizer.pad_token_id).long()
        hidden = encoder(ids, mask).last_hidden_state * mask[..., None]
        return hidden, hidden[torch.arange(len(captions)), mask.sum(1) - 1][:, None]

    def parse_targets(self, statement: ClipStatement) -> list[int]:
        """Colour, shape, size, path, speed of the mover, of what stands, and background; 0: unstated."""
        row = []
        for part in [*statement.canonical().parts, None][:2]:
            values: list[Any] = [getattr(part.phrase, name) for name in CHOICES] if part else [None] * len(CHOICES)
            values += [part.path, part.speed] if part else [None, None]
            row += [class_of(value, names) for value, names in zip(values, self.choices, strict=True)]
        return [*row, class_of(statement.background, tuple(BACKGROUNDS))]
