"""Wan 2.1 and 2.2, text to video: a UMT5 encoder, a transformer or two over clips, rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import DISPATCHED_BACKENDS, Conditioning
from pipelines.process import RectifiedFlow, scheduler_shift
from pipelines.video import VideoPipeline

T5_TOKENS = 512  # what the pipeline gives its text encoder unless told otherwise


class Wan(VideoPipeline):
    """Wan (arXiv 2503.20314). Latents are (z - mean) / std, channel by channel.

    The larger Wan 2.2 has two denoisers: `transformer` serves noise from `boundary_ratio` on, `transformer_2` what is
    below; one of them is trained, on its own span of sigmas. The smaller one tells each token its own time.
    """

    family = "wan"
    pipeline_classes = ("WanPipeline",)
    denoiser_name = "transformer"
    experts = {"high": "transformer", "low": "transformer_2"}
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    }
    attention_backends = DISPATCHED_BACKENDS
    dispatches = True
    required_multiple = 16
    clip_size = (81, 480, 832)

    def __init__(
        self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None, expert: str | None = None
    ) -> None:
        boundary, span = pipe.config.boundary_ratio, (0.0, 1.0)
        if boundary is not None:
            low = expert == "low"
            self.denoiser_name = self.experts["low" if low else "high"]
            span = (0.0, boundary) if low else (boundary, 1.0)
            # The other expert is needed to generate, and no more to train from a cache than the encoders are.
            self.encoder_names = (*self.encoder_names, self.experts["high" if low else "low"])
        super().__init__(pipe, source, vae_config)
        self.process = RectifiedFlow(scheduler_shift(pipe.scheduler.config), span)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        denoiser = denoiser or self.denoiser
        if self.pipe.config.expand_timesteps:
            sides = zip(noisy_latents.shape[2:], self.denoiser.config.patch_size, strict=True)
            frames, height, width = (side // patch for side, patch in sides)
            timesteps = timesteps[:, None].expand(-1, frames * height * width)
        prediction: Tensor = denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            return_dict=False,
        )[0]
        return prediction

    def normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(self.vae_config[name]).view(1, -1, 1, 1, 1).to(latents)
            for name in ("latents_mean", "latents_std")
        )
        return mean, 1 / std

    @property
    def lora_options(self) -> dict[str, Any]:
        return {"load_into_transformer_2": self.denoiser_name == "transformer_2"}

    @property
    def feature_block(self) -> str:
        return f"blocks.{self.denoiser.config.num_layers // 2}"

    @property
    def vae_factor(self) -> int:
        return int(self.vae_config["scale_factor_spatial"])

    @property
    def frame_multiple(self) -> int:
        return int(self.vae_config["scale_factor_temporal"])

    @property
    def patch_size(self) -> int:
        return int(self.denoiser.config.patch_size[-1])

    @property
    def text_tokens(self) -> int:
        return min(T5_TOKENS, self.pipe.tokenizer.model_max_length)
