"""LTX-Video, text to video: a T5 encoder, a transformer over strongly compressed clips, rectified flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipelines.base import Conditioning
from pipelines.video import VideoPipeline


class LTXVideo(VideoPipeline):
    """LTX-Video (arXiv 2501.00103), versions 0.9 and 0.9.1. Latents are (z - mean) x scale / std, channel by channel.

    Later versions have another diffusers pipeline, which gives tokens other positions and times.
    """

    family = "ltx"
    fps = 25.0  # the pipeline's default
    pipeline_classes = ("LTXPipeline",)
    single_file_layouts = ("ltx-video", "ltx-video-0.9.1")
    text_outputs = ("prompt_embeds", "prompt_attention_mask")
    flow = True
    resolution_shift = True
    lora_base = ("ltxv", "lightricks-ltx-video")
    comfyui_names = {r"(transformer_blocks\..*|proj_out)": r"\1", "proj_in": "patchify_proj"}
    attention_backends = ("native", "xformers")  # FlashAttention takes no mask, and its prompts are masked
    dispatches = True
    required_multiple = 32
    t5_tokens = 128
    trained_size = (161, 512, 704)

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().text_shapes()
        return {**shapes, "prompt_attention_mask": shapes["prompt_embeds"][:1]}

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        latents = self.pipe._pack_latents(noisy_latents, *self._patches)
        return {
            **super().denoiser_inputs(latents, timesteps, conditioning),
            "encoder_attention_mask": conditioning["prompt_attention_mask"],
            **dict(zip(("num_frames", "height", "width"), noisy_latents.shape[2:], strict=True)),
            "rope_interpolation_scale": (self.frame_multiple / self.fps, self.vae_factor, self.vae_factor),
        }

    def unpack(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        unpacked: Tensor = self.pipe._unpack_latents(output, *noisy_latents.shape[2:], *self._patches)
        return unpacked

    @property
    def _patches(self) -> tuple[int, int]:
        return self.denoiser.config.patch_size, self.denoiser.config.patch_size_t

    def run_decoder(self, latents: Tensor) -> Tensor:
        # Some of these decoders take a time for a last step of denoising; the pipeline adds no noise, so t = 0.
        time = latents.new_zeros(len(latents)) if self.vae_config["timestep_conditioning"] else None
        pixels: Tensor = self.pipe.vae.decode(latents, time).sample
        return pixels

    @property
    def compression(self) -> tuple[int, int]:
        config = self.vae_config
        scale = 2 ** sum(config["spatio_temporal_scaling"])
        frames: int = config["temporal_compression_ratio"] or config["patch_size_t"] * scale
        return frames, config["spatial_compression_ratio"] or config["patch_size"] * scale
