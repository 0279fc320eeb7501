"""Stable Diffusion 3 and 3.5: two CLIP encoders and an optional T5, a joint transformer, rectified flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning, PipelineError
from pipelines.image import ImagePipeline
from pipelines.process import RectifiedFlow, scheduler_shift

T5_TOKENS = 256  # what the pipeline gives its T5 unless told otherwise


class StableDiffusion3(ImagePipeline):
    """SD3 / SD3.5 (arXiv 2403.03206). Without a T5 its tokens are zeros, as in the diffusers pipeline."""

    family = "sd3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    denoiser_name = "transformer"
    encoder_names = (
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
    )  # fmt: skip
    optional_encoders = ("text_encoder_3", "tokenizer_3")
    large_encoders = ("text_encoder_3",)
    lora_presets = {
        "attention": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        ),
        "all": (
            "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
            "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        ),
    }  # fmt: skip
    attention_backends = ("native", "xformers")

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(pipe, source, vae_config)
        self.process = RectifiedFlow(scheduler_shift(pipe.scheduler.config))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        texts = list(prompts)
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        denoiser = denoiser or self.denoiser
        prediction: Tensor = denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return prediction

    def call_options(self, prompts: list[str], negative_prompt: str, guidance: float) -> dict[str, Any]:
        return {
            **super().call_options(prompts, negative_prompt, guidance),
            "max_sequence_length": self._t5_tokens,
        }

    @property
    def feature_block(self) -> str:
        return f"transformer_blocks.{self.denoiser.config.num_layers // 2}"

    def feature_of(self, output: Any) -> Tensor:
        found: Tensor = output[1]  # (text's, image's)
        return found

    @property
    def size_multiple(self) -> int:
        return self.vae_factor * int(self.denoiser.config.patch_size)

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        most = self.size_multiple * int(self.denoiser.config.pos_embed_max_size)
        if max(height, width) > most:
            raise PipelineError(f"images of {height} x {width} pixels: {self.source} goes up to {most} a side")

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        return height * width // self.size_multiple**2

    @property
    def _t5_tokens(self) -> int:
        tokenizer = self.pipe.tokenizer_3
        return T5_TOKENS if tokenizer is None else min(T5_TOKENS, tokenizer.model_max_length)
