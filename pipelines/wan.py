"""Wan 2.1 and 2.2, text to video: a UMT5 encoder, a transformer or two over clips, rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipelines.base import Conditioning
from pipelines.denoiser import DISPATCHED_BACKENDS
from pipelines.lora import ATTENTION
from pipelines.video import VideoPipeline


class Wan(VideoPipeline):
    """Wan (arXiv 2503.20314). Latents are (z - mean) / std, channel by channel.

    The larger Wan 2.2 has two denoisers: `transformer` from sigma = `boundary_ratio` on, `transformer_2` below it; one
    of them is trained, on its own span of sigmas. The smaller one takes a time per token.
    """

    family = "wan"
    pipeline_classes = ("WanPipeline",)
    flow = True
    experts = {"high": "transformer", "low": "transformer_2"}
    lora_presets = {"attention": ATTENTION, "all": (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")}
    lora_base = ("wan", "wan-2.1")
    comfyui_names = {
        r"blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.self_attn.\2",
        r"blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.self_attn.o",
        r"blocks\.(\d+)\.attn2\.to_([qkv])": r"blocks.\1.cross_attn.\2",
        r"blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.o",
        r"blocks\.(\d+)\.attn2\.add_([kv])_proj": r"blocks.\1.cross_attn.\2_img",
        r"blocks\.(\d+)\.ffn\.net\.0\.proj": r"blocks.\1.ffn.0",
        r"blocks\.(\d+)\.ffn\.net\.2": r"blocks.\1.ffn.2",
    }
    attention_backends = DISPATCHED_BACKENDS
    dispatches = True
    required_multiple = 16
    t5_tokens = 512
    trained_size = (81, 480, 832)

    def __init__(
        self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None, expert: str | None = None
    ) -> None:
        if (boundary := pipe.config.boundary_ratio) is not None:
            low = expert == "low"
            self.denoiser_name = self.experts["low" if low else "high"]
            self.span = (0.0, boundary) if low else (boundary, 1.0)
            # As the encoders, the other expert is needed to generate but not to train from a cache.
            self.encoder_names = (*self.encoder_names, self.experts["high" if low else "low"])
        super().__init__(pipe, source, vae_config)

    def denoiser_at(self, timestep: float) -> Any:
        boundary = self.pipe.config.boundary_ratio
        return self.pipe.transformer_2 if boundary is not None and timestep < 1000 * boundary else self.pipe.transformer

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        if self.pipe.config.expand_timesteps:
            sides = zip(noisy_latents.shape[2:], self.denoiser.config.patch_size, strict=True)
            frames, height, width = (side // patch for side, patch in sides)
            timesteps = timesteps[:, None].expand(-1, frames * height * width)
        return super().denoiser_inputs(noisy_latents, timesteps, conditioning)

    @property
    def lora_options(self) -> dict[str, Any]:
        return {"load_into_transformer_2": self.denoiser_name == "transformer_2"}

    @property
    def feature_block(self) -> str:
        return f"blocks.{self.denoiser.config.num_layers // 2}"

    @property
    def compression(self) -> tuple[int, int]:
        return self.vae_config["scale_factor_temporal"], self.vae_config["scale_factor_spatial"]
