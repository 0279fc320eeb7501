"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, epsilon- or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning
from pipelines.image import ImagePipeline
from pipelines.process import VariancePreserving

UNET_LORA = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "all": (
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut",
    ),
}  # fmt: skip


class StableDiffusion(ImagePipeline):
    """SD1.x / SD2.x. The prediction type and the noise table are the checkpoint's own scheduler's."""

    family = "sd"
    pipeline_classes = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    lora_presets = UNET_LORA
    feature_block = "mid_block"
    attention_backends = ("native", "xformers")
    kohya = True

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(pipe, source, vae_config)
        config = pipe.scheduler.config
        self.process = VariancePreserving(pipe.scheduler.alphas_cumprod, config.prediction_type)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        # SD2's text encoder asks for the padding mask, SD1's does not: read it from the checkpoint, as diffusers does.
        mask = tokens.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", None) else None
        return {"prompt_embeds": encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]}

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        denoiser = denoiser or self.denoiser
        prediction: Tensor = denoiser(
            noisy_latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
        )[0]
        return prediction
