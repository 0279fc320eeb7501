"""FLUX.1: a CLIP and a T5 encoder, a transformer over 2 x 2 patches, rectified flow, distilled guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import DISPATCHED_BACKENDS, Conditioning, PipelineError
from pipelines.image import ImagePipeline
from pipelines.process import RectifiedFlow, scheduler_shift

T5_TOKENS = 512  # what the pipeline gives its T5 unless told otherwise
TRAINING_GUIDANCE = 3.5  # what diffusers' FLUX trainers and the pipeline itself use unless told otherwise


class Flux(ImagePipeline):
    """FLUX.1 dev, schnell and models of their layout.

    The guidance-distilled ones are told a guidance scale as they are told the time; `training_guidance` is what they
    are told in training.
    """

    family = "flux"
    pipeline_classes = ("FluxPipeline",)
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    large_encoders = ("text_encoder_2",)
    lora_presets = {
        "attention": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        ),
        "all": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
        ),
    }  # fmt: skip
    attention_backends = DISPATCHED_BACKENDS
    dispatches = True

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(pipe, source, vae_config)
        self.process = RectifiedFlow(scheduler_shift(pipe.scheduler.config))
        self.training_guidance = TRAINING_GUIDANCE

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        embeddings, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self._t5_tokens
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        denoiser = denoiser or self.denoiser
        batch, channels, height, width = noisy_latents.shape
        device, dtype = noisy_latents.device, noisy_latents.dtype
        embeddings = conditioning["prompt_embeds"]
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((batch,), self.training_guidance, device=device, dtype=torch.float32)
        prediction: Tensor = denoiser(
            hidden_states=self.pipe._pack_latents(noisy_latents, batch, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=embeddings,
            txt_ids=torch.zeros(embeddings.shape[1], 3, device=device, dtype=dtype),
            img_ids=self.pipe._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpack_latents(prediction, height, width, 1)
        return unpacked

    def call_options(self, prompts: list[str], negative_prompt: str, guidance: float) -> dict[str, Any]:
        if negative_prompt:
            raise PipelineError("FLUX.1 has its guidance distilled into it and knows no negative prompt; leave it out")
        return {"prompt": prompts, "guidance_scale": guidance, "max_sequence_length": self._t5_tokens}

    @property
    def feature_block(self) -> str:
        double, single = self.denoiser.config.num_layers, self.denoiser.config.num_single_layers
        middle = (double + single) // 2
        return f"transformer_blocks.{middle}" if middle < double else f"single_transformer_blocks.{middle - double}"

    def feature_of(self, output: Any) -> Tensor:
        found: Tensor = output[1]  # (text's, image's)
        return found

    @property
    def default_size(self) -> tuple[int, int]:
        side = int(self.pipe.default_sample_size) * self.vae_factor
        height, width = self.own_size or (side, side)
        return height, width

    @property
    def size_multiple(self) -> int:
        return 2 * self.vae_factor

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        return height * width // self.size_multiple**2

    @property
    def _t5_tokens(self) -> int:
        return min(T5_TOKENS, self.pipe.tokenizer_2.model_max_length)
