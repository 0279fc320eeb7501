"""CogVideoX and CogVideoX1.5, text to video: a T5 encoder, a joint transformer over clips, v-prediction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipelines.base import Conditioning
from pipelines.video import VideoPipeline

# CogVideoX1.5's configuration has the size that its positions are scaled by; the clips' size is on its model card.
POSITIONS_15, SIZE_15 = (300, 300), (768, 1360)
DECODED_TOGETHER = 2  # latent frames: the VAE decodes an even number of them to too many frames


class CogVideoX(VideoPipeline):
    """CogVideoX (arXiv 2408.06072). The noise table, with no signal at its end, is that of the checkpoint's scheduler.

    CogVideoX1.5 has tokens of two latent frames, and an odd number of latent frames: copies of the first are prepended
    and cut off again after sampling, as in the diffusers pipeline.
    """

    family = "cogvideox"
    fps = 8.0
    pipeline_classes = ("CogVideoXPipeline",)
    required_multiple = 8
    lora_namings = ("diffusers",)
    lora_base = ("cogvideox", "cogvideox")

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        latents = super().encode_pixels(pixels)
        return torch.cat([latents[:, :, :1]] * self.padded_frames + [latents], dim=2)

    def decode(self, latents: Tensor, first: int | None = None) -> Tensor:
        return super().decode(latents[:, :, self.padded_frames :], first)

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        rotary = None
        if self.denoiser.config.use_rotary_positional_embeddings:
            frames, *latent_size = noisy_latents.shape[2:]
            height, width = (side * self.pipe.vae_scale_factor_spatial for side in latent_size)
            rotary = self.pipe._prepare_rotary_positional_embeddings(height, width, frames, noisy_latents.device)
        latents = noisy_latents.transpose(1, 2)  # its clips are [B, f, C, h, w]
        return {**super().denoiser_inputs(latents, timesteps, conditioning), "image_rotary_emb": rotary}

    def unpack(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        return output.transpose(1, 2)

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        channels, latent_frames, *sides = super().latent_shape(height, width, frames)
        return channels, latent_frames + self.padded_frames, *sides

    def latent_times(self, frames: int, fps: float | None = None) -> list[float]:
        return [0.0] * self.padded_frames + super().latent_times(frames, fps)

    @property
    def temporal_factor(self) -> int:
        return int(self.vae_config["temporal_compression_ratio"])

    @property
    def padded_frames(self) -> int:
        """Latent frames prepended to a clip's own."""
        return (self.denoiser.config.patch_size_t or 1) - 1

    @property
    def trained_size(self) -> tuple[int, ...]:
        config = self.denoiser.config
        if (config.sample_height, config.sample_width) == POSITIONS_15:
            return config.sample_frames, *SIZE_15
        return config.sample_frames, config.sample_height * self.vae_factor, config.sample_width * self.vae_factor

    @property
    def compression(self) -> tuple[int, int]:
        together = math.lcm(DECODED_TOGETHER, self.denoiser.config.patch_size_t or 1)
        return together * self.temporal_factor, super().compression[1]

    @property
    def text_tokens(self) -> int:
        # Not the pipeline's default: the positions of some checkpoints are built for exactly this number.
        limits = [] if self.pipe.tokenizer is None else [int(self.pipe.tokenizer.model_max_length)]
        return min([int(self.denoiser.config.max_text_seq_length), *limits])
