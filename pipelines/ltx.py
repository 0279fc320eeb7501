"""LTX-Video, text to video: a T5 encoder, a transformer over strongly compressed clips, rectified flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning
from pipelines.process import RectifiedFlow, scheduler_shift
from pipelines.video import VideoPipeline

T5_TOKENS = 128  # what the pipeline gives its T5 unless told otherwise
FRAME_RATE = 25  # frames a second that the pipeline assumes unless told otherwise


class LTXVideo(VideoPipeline):
    """LTX-Video (arXiv 2501.00103), versions 0.9 and 0.9.1. Latents are (z - mean) x scale / std, channel by channel.

    Later versions come with another diffusers pipeline, which gives tokens other positions and times.
    """

    family = "ltx"
    fps = 25.0
    pipeline_classes = ("LTXPipeline",)
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    }
    attention_backends = ("native", "xformers")  # FlashAttention takes no mask, and its prompts are masked
    dispatches = True
    required_multiple = 32
    clip_size = (161, 512, 704)

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(pipe, source, vae_config)
        self.process = RectifiedFlow(scheduler_shift(pipe.scheduler.config))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.device,
        )
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        denoiser = denoiser or self.denoiser
        frames, height, width = noisy_latents.shape[2:]
        patches = self.denoiser.config.patch_size, self.denoiser.config.patch_size_t
        prediction: Tensor = denoiser(
            hidden_states=self.pipe._pack_latents(noisy_latents, *patches),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timesteps,
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.frame_multiple / FRAME_RATE, self.vae_factor, self.vae_factor),
            return_dict=False,
        )[0]
        unpacked: Tensor = self.pipe._unpack_latents(prediction, frames, height, width, *patches)
        return unpacked

    def normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        mean, std = (values.view(1, -1, 1, 1, 1).to(latents) for values in (vae.latents_mean, vae.latents_std))
        return mean, vae.config.scaling_factor / std

    def decode_raw(self, latents: Tensor) -> Tensor:
        # Some of these decoders take the last step of denoising; without noise added, as the pipeline has it, t = 0.
        time = latents.new_zeros(len(latents)) if self.vae_config["timestep_conditioning"] else None
        pixels: Tensor = self.pipe.vae.decode(latents, time).sample
        return pixels

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        frames = self.default_frames if frames is None else frames
        return ((frames - 1) // self.frame_multiple + 1) * (height // self.vae_factor) * (width // self.vae_factor)

    @property
    def feature_block(self) -> str:
        return f"transformer_blocks.{self.denoiser.config.num_layers // 2}"

    @property
    def vae_factor(self) -> int:
        config = self.vae_config
        given: int | None = config["spatial_compression_ratio"]
        return given or config["patch_size"] * 2 ** sum(config["spatio_temporal_scaling"])

    @property
    def frame_multiple(self) -> int:
        config = self.vae_config
        given: int | None = config["temporal_compression_ratio"]
        return given or config["patch_size_t"] * 2 ** sum(config["spatio_temporal_scaling"])

    @property
    def patch_size(self) -> int:
        return int(self.denoiser.config.patch_size)

    @property
    def text_tokens(self) -> int:
        return min(T5_TOKENS, self.pipe.tokenizer.model_max_length)
