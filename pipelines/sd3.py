"""Stable Diffusion 3 and 3.5: two CLIP encoders and an optional T5, a joint transformer, rectified flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipelines.base import Conditioning, PipelineError
from pipelines.image import ImagePipeline
from pipelines.lora import FEED_FORWARD, JOINT_ATTENTION, TEXT_FEED_FORWARD

T5_TOKENS = 256  # the pipeline's default


class StableDiffusion3(ImagePipeline):
    """SD3 / SD3.5 (arXiv 2403.03206). Without a T5 its tokens are zeros, as in the diffusers pipeline."""

    family = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    single_file_layouts = ("sd3", "sd35_large", "sd35_medium")
    encoder_names = (
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
    )  # fmt: skip
    optional_encoders = ("text_encoder_3", "tokenizer_3")
    large_encoders = ("text_encoder_3",)
    text_outputs = ("prompt_embeds", "", "pooled_prompt_embeds")
    flow = True
    lora_presets = {
        "attention": tuple(f"attn.{name}" for name in JOINT_ATTENTION),
        "all": (*JOINT_ATTENTION, *FEED_FORWARD, *TEXT_FEED_FORWARD),
    }
    attention_backends = ("native", "xformers")
    feature_output = 1  # (text's, image's)

    @property
    def text_options(self) -> dict[str, Any]:
        t5 = self.pipe.tokenizer_3
        tokens = T5_TOKENS if t5 is None else min(T5_TOKENS, t5.model_max_length)
        return {**super().text_options, "prompt_2": None, "prompt_3": None, "max_sequence_length": tokens}

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        return self.run(
            denoiser,
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
        )

    @property
    def size_multiple(self) -> int:
        return self.vae_factor * int(self.denoiser.config.patch_size)

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        most = self.size_multiple * int(self.denoiser.config.pos_embed_max_size)
        if max(height, width) > most:
            raise PipelineError(f"images of {height} x {width} pixels: {self.source} takes at most {most} a side")
