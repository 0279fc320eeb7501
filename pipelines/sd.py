"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet, epsilon- or v-prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pipelines.base import Conditioning
from pipelines.image import ImagePipeline
from pipelines.lora import ATTENTION, FEED_FORWARD


class StableDiffusion(ImagePipeline):
    """SD1.x / SD2.x. The prediction type and the noise table are those of the checkpoint's scheduler."""

    family = "sd"
    pipeline_classes = ("StableDiffusionPipeline",)
    single_file_layouts: ClassVar[tuple[str, ...]] = ("v1", "v2")
    load_options: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }  # an image filter of SD1.5
    denoiser_name = "unet"
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    lora_presets = {
        "attention": ATTENTION,
        "all": (*ATTENTION, "proj_in", "proj_out", *FEED_FORWARD, "conv1", "conv2", "conv_shortcut"),
    }
    kohya = True
    attention_backends = ("native", "xformers")
    feature_block = "mid_block"

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        return self.run(denoiser, noisy_latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"])
