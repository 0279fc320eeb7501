"""CogVideoX and CogVideoX1.5, text to video: a T5 encoder, a joint transformer over clips, v-prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning
from pipelines.process import VariancePreserving
from pipelines.video import VideoPipeline

# CogVideoX1.5's configuration has the sides that its positions are scaled by; its clips' are on its model card.
POSITIONS_15, SIZE_15 = (300, 300), (768, 1360)
DECODED_TOGETHER = 2  # latent frames: the VAE decodes an even number of them to too many frames


class CogVideoX(VideoPipeline):
    """CogVideoX (arXiv 2408.06072). The noise table, without signal at its end, is the checkpoint's own scheduler's.

    CogVideoX1.5 has tokens of two latent frames, and an odd number of them: copies of the first are put before it, and
    what they become is cut off again, as its authors and the diffusers pipeline do.
    """

    family = "cogvideox"
    fps = 8.0
    pipeline_classes = ("CogVideoXPipeline",)
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    }
    required_multiple = 8

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(pipe, source, vae_config)
        config = pipe.scheduler.config
        self.process = VariancePreserving(pipe.scheduler.alphas_cumprod, config.prediction_type)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        latents = super().encode_pixels(pixels)
        return torch.cat([latents[:, :, :1]] * self.padded_frames + [latents], dim=2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return super().decode_latents(latents[:, :, self.padded_frames :])

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        denoiser = denoiser or self.denoiser
        rotary = None
        if self.denoiser.config.use_rotary_positional_embeddings:
            frames, *latent_size = noisy_latents.shape[2:]
            height, width = (side * self.pipe.vae_scale_factor_spatial for side in latent_size)
            rotary = self.pipe._prepare_rotary_positional_embeddings(height, width, frames, noisy_latents.device)
        prediction: Tensor = denoiser(
            hidden_states=noisy_latents.transpose(1, 2),  # its clips are [B, f, C, h, w]
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timesteps,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def normalisation(self, latents: Tensor) -> tuple[float, float]:
        return 0.0, float(self.vae_config["scaling_factor"])

    @property
    def padded_frames(self) -> int:
        """Latent frames before a clip's own."""
        return (self.denoiser.config.patch_size_t or 1) - 1

    @property
    def feature_block(self) -> str:
        return f"transformer_blocks.{self.denoiser.config.num_layers // 2}"

    @property
    def clip_size(self) -> tuple[int, int, int]:
        config = self.denoiser.config
        if (config.sample_height, config.sample_width) == POSITIONS_15:
            return config.sample_frames, *SIZE_15
        return config.sample_frames, config.sample_height * self.vae_factor, config.sample_width * self.vae_factor

    @property
    def vae_factor(self) -> int:
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def frame_multiple(self) -> int:
        together = math.lcm(DECODED_TOGETHER, self.denoiser.config.patch_size_t or 1)
        return together * int(self.vae_config["temporal_compression_ratio"])

    @property
    def patch_size(self) -> int:
        return int(self.denoiser.config.patch_size)

    @property
    def text_tokens(self) -> int:
        # Not the pipeline's own default: the positions of some checkpoints are made for exactly so many.
        return min(self.denoiser.config.max_text_seq_length, self.pipe.tokenizer.model_max_length)
