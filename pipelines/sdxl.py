"""Stable Diffusion XL: two CLIP text encoders, and a UNet conditioned on each image's size and crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.base import Conditioning
from pipelines.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL (arXiv 2307.01952) and models of its layout, epsilon- or v-prediction.

    The empty prompt's embedding is zero where the checkpoint sets `force_zeros_for_empty_prompt`: what its pipeline
    guides away from. Here that holds for an empty prompt in `generate` too, which the pipeline itself would encode.
    """

    family = "sdxl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    single_file_layouts = ("xl_base",)
    load_options = {}
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_outputs = ("prompt_embeds", "", "pooled_prompt_embeds")
    size_conditioned = True

    def lora_version(self) -> tuple[str, str]:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        conditioning = super().encode_prompts(prompts)
        if self.pipe.config.force_zeros_for_empty_prompt:
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                conditioning[name][[not prompt for prompt in prompts]] = 0
        return conditioning

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().text_shapes(), "pooled_prompt_embeds": (pooled,)}

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The denoiser's arguments, with "time_ids" where the conditioning has them.

        These are [B, 6] in pixels: the image's original height and width, the crop's top and left, the target's height
        and width; without them, an uncropped image of the latents' size.
        """
        time_ids = conditioning.get("time_ids")
        if time_ids is None:
            height, width = (side * self.vae_factor for side in noisy_latents.shape[-2:])
            time_ids = torch.tensor([height, width, 0, 0, height, width], device=noisy_latents.device)
            time_ids = time_ids.expand(len(noisy_latents), -1)
        pooled = conditioning["pooled_prompt_embeds"]
        inputs = super().denoiser_inputs(noisy_latents, timesteps, conditioning)
        return {**inputs, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.to(pooled.dtype)}}
