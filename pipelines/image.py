"""What the image families share: an `AutoencoderKL` and the normalisation of its latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipelines.base import PipelineError
from pipelines.pipeline import TrainablePipeline


class ImagePipeline(TrainablePipeline):
    """A family of images [B, 3, H, W]. Its latents [B, C, h, w] are (z - shift) x scale.

    scale and shift are the VAE's `scaling_factor` and `shift_factor` (0 where it has none); a VAE that carries
    `latents_mean` and `latents_std`, as some of SDXL's do, is normalised by these as well.
    """

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 4:
            raise PipelineError(f"{self.family} takes images [B, 3, H, W], found {list(pixels.shape)}")
        vae = self.pipe.vae
        self.check_size(*pixels.shape[-2:])
        latents: Tensor = vae.encode((2 * pixels - 1).to(vae.device, vae.dtype)).latent_dist.mode()
        shift, scale = self._normalisation(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        shift, scale = self._normalisation(latents)
        pixels: Tensor = vae.decode((latents / scale + shift).to(vae.device, vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    @property
    def default_size(self) -> tuple[int, int]:
        side = int(self.denoiser.config.sample_size) * self.vae_factor
        return side, side

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        if frames is not None:
            raise PipelineError(f"{self.family} makes images, but a clip of {frames} frames was asked for")
        multiple = self.size_multiple
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise PipelineError(
                f"images of {height} x {width} pixels do not fit {self.family} as {self.source} has it: "
                f"both sides must be multiples of {multiple}"
            )

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        # diffusers assumes 8 where the VAE is not loaded, so it is read from the configuration.
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        """What both sides must be multiples of, in pixels."""
        return self.vae_factor

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        return height * width // self.size_multiple**2

    def _normalisation(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        config: Any = self.vae_config
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return shift, scale
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        return mean, scale / std
