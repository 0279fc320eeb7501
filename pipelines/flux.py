"""FLUX.1: a CLIP and a T5 encoder, a transformer over 2 x 2 patches, rectified flow, distilled guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.base import Conditioning
from pipelines.denoiser import DISPATCHED_BACKENDS
from pipelines.lora import FEED_FORWARD, JOINT_ATTENTION, TEXT_FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class Flux(TrainablePipeline):
    """FLUX.1 dev, schnell and models of their layout.

    The guidance-distilled ones take a guidance scale as an input beside the time; in training it is
    `training_guidance`.
    """

    family = "flux"
    pipeline_classes = ("FluxPipeline",)
    single_file_layouts = ("flux-dev", "flux-schnell")
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    large_encoders = ("text_encoder_2",)
    text_options = {}
    text_outputs = ("prompt_embeds", "pooled_prompt_embeds")
    t5_tokenizer = "tokenizer_2"
    t5_tokens = 512
    flow = True
    distilled_guidance = True
    training_guidance = 3.5  # the default of the pipeline and of diffusers' FLUX trainers
    lora_presets = {
        "attention": JOINT_ATTENTION,
        "all": (*JOINT_ATTENTION, *FEED_FORWARD, *TEXT_FEED_FORWARD, "proj_mlp", "proj_out"),
    }
    lora_excluded = "proj_out"  # the last layer, after the blocks
    attention_backends = DISPATCHED_BACKENDS
    dispatches = True
    feature_output = 1  # (text's, image's)

    def lora_version(self) -> tuple[str, str]:
        return "flux1", f"flux-1-{'dev' if self.denoiser.config.guidance_embeds else 'schnell'}"

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        batch, channels, height, width = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((batch,), self.training_guidance, device=device, dtype=torch.float32)
        latents = self.pipe._pack_latents(noisy_latents, batch, channels, height, width)
        return {
            **super().denoiser_inputs(latents, timesteps / 1000, conditioning),
            "guidance": guidance,
            "pooled_projections": conditioning["pooled_prompt_embeds"],
            "txt_ids": torch.zeros(conditioning["prompt_embeds"].shape[1], 3, device=device, dtype=dtype),
            "img_ids": self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
        }

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {
            "prompt_embeds": (int(self.text_tokens or 0), config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def unpack(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        unpacked: Tensor = self.pipe._unpack_latents(output, *noisy_latents.shape[-2:], 1)
        return unpacked

    @property
    def feature_block(self) -> str:
        double, single = self.denoiser.config.num_layers, self.denoiser.config.num_single_layers
        middle = (double + single) // 2
        return f"transformer_blocks.{middle}" if middle < double else f"single_transformer_blocks.{middle - double}"

    @property
    def trained_size(self) -> tuple[int, ...]:
        side = int(self.pipe.default_sample_size) * self.vae_factor
        return side, side

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae_factor
