"""Pixels to normalised latents and back, through the pipeline's VAE."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from pipelines.base import Family, PipelineError


class VAEMixin(Family):
    """Latents are (z - shift) x scale.

    scale and shift are the VAE's `scaling_factor` and `shift_factor` (1 and 0 where it has none); with `latents_mean`
    and `latents_std`, which video VAEs and some of SDXL's have, they are scaling_factor / std and mean per channel.
    """

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Both sides are multiples of this, in pixels."""

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != (5 if self.video else 4):
            expected = "clips [B, F, 3, H, W]" if self.video else "images [B, 3, H, W]"
            raise PipelineError(f"{self.family} takes {expected}, found {list(pixels.shape)}")
        height, width = pixels.shape[-2:]
        self.check_size(height, width, pixels.shape[1] if self.video else None)
        vae, inputs = self.pipe.vae, 2 * pixels - 1
        batches = inputs.transpose(1, 2).split(1) if self.video else (inputs,)  # a clip alone fills a lot of memory
        latents = torch.cat([vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode() for batch in batches])
        shift, scale = self.normalisation(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        shift, scale = self.normalisation(latents)
        latents = (latents / scale + shift).to(vae.device, vae.dtype)
        if self.video:
            pixels = torch.cat([self.run_decoder(clip) for clip in latents.split(1)]).transpose(1, 2)
        else:
            pixels = self.run_decoder(latents)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def run_decoder(self, latents: Tensor) -> Tensor:
        """The VAE's output for latents that are no longer normalised."""
        pixels: Tensor = self.pipe.vae.decode(latents).sample
        return pixels

    def normalisation(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale), each a number or shaped to multiply with `latents`."""
        config = self.vae_config
        scale, mean, std = config.get("scaling_factor", 1.0), config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, scale
        shape = (1, -1, *([1] * (latents.ndim - 2)))
        mean, std = (torch.as_tensor(values).view(shape).to(latents) for values in (mean, std))
        return mean, scale / std

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        if self.video and frames is None:
            raise PipelineError(f"{self.family} makes clips: give their number of frames")
        if frames is not None and not self.video:
            raise PipelineError(f"{self.family} makes images, but a clip of {frames} frames was asked for")
        multiple = self.size_multiple
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise PipelineError(
                f"{'clips' if self.video else 'images'} of {height} x {width} pixels do not fit {self.family} as "
                f"{self.source} has it: both sides must be multiples of {multiple}"
            )

    def tile_vae(self) -> None:
        """Run the VAE over large images in tiles and over batches one by one: less memory."""
        self.pipe.vae.enable_tiling()
        self.pipe.vae.enable_slicing()
