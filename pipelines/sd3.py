"""Stable Diffusion 3 and 3.5: two CLIP encoders and an optional T5, a joint transformer, rectified flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipelines.base import Conditioning, PipelineError
from pipelines.lora import FEED_FORWARD, JOINT_ATTENTION, TEXT_FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class StableDiffusion3(TrainablePipeline):
    """SD3 / SD3.5 (arXiv 2403.03206). Without a T5 its tokens are zeros, as in the diffusers pipeline."""

    family = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    single_file_layouts = ("sd3", "sd35_large", "sd35_medium")
    encoder_names = (
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
    )  # fmt: skip
    optional_encoders = ("text_encoder_3", "tokenizer_3")
    large_encoders = ("text_encoder_3",)
    text_options = {**TrainablePipeline.text_options, "prompt_2": None, "prompt_3": None}
    text_outputs = ("prompt_embeds", "", "pooled_prompt_embeds")
    t5_tokenizer = "tokenizer_3"
    t5_tokens = 256
    flow = True
    lora_presets = {
        "attention": tuple(f"attn.{name}" for name in JOINT_ATTENTION),
        "all": (*JOINT_ATTENTION, *FEED_FORWARD, *TEXT_FEED_FORWARD),
    }
    lora_base = ("sd3", "stable-diffusion-3")
    attention_backends = ("native", "xformers")
    feature_output = 1  # (text's, image's)

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        inputs = super().denoiser_inputs(noisy_latents, timesteps, conditioning)
        return {**inputs, "pooled_projections": conditioning["pooled_prompt_embeds"]}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config, tokens = self.denoiser.config, self.clip_tokens + int(self.text_tokens or 0)
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        most = self.size_multiple * int(self.denoiser.config.pos_embed_max_size)
        if max(height, width) > most:
            raise PipelineError(f"images of {height} x {width} pixels: {self.source} takes at most {most} a side")
