"""What the image families share: an `AutoencoderKL`, and sizes derived from it."""

from __future__ import annotations

from pipelines.pipeline import TrainablePipeline


class ImagePipeline(TrainablePipeline):
    """A family of images [B, 3, H, W] with latents [B, C, h, w]."""

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        # diffusers assumes 8 where the VAE is not loaded, so it is read from the configuration.
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple(self) -> int:
        return self.vae_factor

    @property
    def default_size(self) -> tuple[int, int]:
        side = int(self.denoiser.config.sample_size) * self.vae_factor
        return side, side

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        return height * width // self.size_multiple**2
