"""LTX-Video, text to video: a T5 encoder, a transformer over strongly compressed clips, rectified flow."""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.base import Conditioning
from pipelines.video import VideoPipeline

FRAME_RATE = 25  # the pipeline's default


class LTXVideo(VideoPipeline):
    """LTX-Video (arXiv 2501.00103), versions 0.9 and 0.9.1. Latents are (z - mean) x scale / std, channel by channel.

    Later versions have another diffusers pipeline, which gives tokens other positions and times.
    """

    family = "ltx"
    fps = 25.0
    pipeline_classes = ("LTXPipeline",)
    single_file_layouts = ("ltx-video", "ltx-video-0.9.1")
    text_outputs = ("prompt_embeds", "prompt_attention_mask")
    flow = True
    attention_backends = ("native", "xformers")  # FlashAttention takes no mask, and its prompts are masked
    dispatches = True
    required_multiple = 32
    max_text_tokens = 128
    clip_size = (161, 512, 704)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        frames, height, width = noisy_latents.shape[2:]
        patches = self.denoiser.config.patch_size, self.denoiser.config.patch_size_t
        prediction = self.run(
            denoiser,
            hidden_states=self.pipe._pack_latents(noisy_latents, *patches),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timesteps,
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.frame_multiple / FRAME_RATE, self.vae_factor, self.vae_factor),
        )
        unpacked: Tensor = self.pipe._unpack_latents(prediction, frames, height, width, *patches)
        return unpacked

    def normalisation(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae  # mean and std are among its weights
        mean, std = (values.view(1, -1, 1, 1, 1).to(latents) for values in (vae.latents_mean, vae.latents_std))
        return mean, vae.config.scaling_factor / std

    def run_decoder(self, latents: Tensor) -> Tensor:
        # Some of these decoders take a time for a last step of denoising; the pipeline adds no noise, so t = 0.
        time = latents.new_zeros(len(latents)) if self.vae_config["timestep_conditioning"] else None
        pixels: Tensor = self.pipe.vae.decode(latents, time).sample
        return pixels

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        frames = self.default_frames if frames is None else frames
        return ((frames - 1) // self.frame_multiple + 1) * (height // self.vae_factor) * (width // self.vae_factor)

    @property
    def compression(self) -> tuple[int, int]:
        config = self.vae_config
        scale = 2 ** sum(config["spatio_temporal_scaling"])
        frames: int = config["temporal_compression_ratio"] or config["patch_size_t"] * scale
        return frames, config["spatial_compression_ratio"] or config["patch_size"] * scale
