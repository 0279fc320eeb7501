"""Pixels to normalised latents and back through the pipeline's VAE, and the sizes that it and the denoiser take.

The defaults are those of images with an `AutoencoderKL`; `video.py` has those of clips.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pipelines.base import Family, PipelineError
from pipelines.process import RectifiedFlow, resolution_shift


class VAEMixin(Family):
    """Latents are (z - shift) x scale.

    scale and shift are the VAE's `scaling_factor` and `shift_factor` (1 and 0 where it has none); with `latents_mean`
    and `latents_std`, which video VAEs and some of SDXL's have, they are scaling_factor / std and mean per channel.
    """

    required_multiple: ClassVar[int] = 1  # the diffusers pipeline itself wants both sides to be multiples of this

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], [B, 3, H, W] or clips [B, F, 3, H, W], to latents [B, C, h, w] or [B, C, f, h, w].

        Normalised as the denoiser expects them, not yet packed into tokens; deterministic: the posterior's mode.
        """
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
        """Latents to pixels in [0, 1], [B, 3, H, W] or clips [B, F, 3, H, W]."""
        return self.decode(latents).clamp(0, 1)

    def decode(self, latents: Tensor, first: int | None = None) -> Tensor:
        """The same with gradients, and not cut off at 0 and 1.

        first: of a clip, so many latent frames only, which takes less memory. A causal decoder that normalises each
        frame by itself (Wan's) makes the same frames of them as of the whole clip, others (CogVideoX's, LTX's) nearly.
        """
        vae = self.pipe.vae
        latents = latents[:, :, :first] if self.video else latents
        shift, scale = self.normalisation(latents)
        latents = (latents / scale + shift).to(vae.device, vae.dtype)
        pixels = torch.cat([self.run_decoder(part) for part in (latents.split(1) if self.video else (latents,))])
        return (pixels.transpose(1, 2) if self.video else pixels).float() / 2 + 0.5

    def run_decoder(self, latents: Tensor) -> Tensor:
        """The VAE's output for latents that are no longer normalised."""
        pixels: Tensor = self.pipe.vae.decode(latents).sample
        return pixels

    def normalisation(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale), each a number or shaped to multiply with `latents`."""
        vae, config = self.pipe.vae, self.vae_config
        # Some keep them among their weights.
        mean, std = (config[n] if n in config else getattr(vae, n, None) for n in ("latents_mean", "latents_std"))
        scale = config.get("scaling_factor", 1.0)
        if mean is None or std is None:
            return config.get("shift_factor") or 0.0, scale
        shape = (1, -1, *([1] * (latents.ndim - 2)))
        mean, std = (torch.as_tensor(values).view(shape).to(latents) for values in (mean, std))
        return mean, scale / std

    def tile_vae(self) -> None:
        """Run the VAE over large images in tiles and over batches one by one: less memory."""
        self.pipe.vae.enable_tiling()
        self.pipe.vae.enable_slicing()

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Shape of the latents, [C, h, w] or [C, f, h, w], of an image or clip of this size in pixels."""
        channels = int(self.vae_config.get("latent_channels") or self.vae_config["z_dim"])
        return channels, height // self.vae_factor, width // self.vae_factor

    # Sizes --------------------------------------------------------------------------------------------------------

    @property
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along one side) that a latent covers."""
        # diffusers assumes 8 where the VAE is not loaded, so it is read from the configuration.
        return 1, 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.compression[1]

    @property
    def frame_multiple(self) -> int:
        """Clips have k x this + 1 frames."""
        return self.compression[0]

    @property
    def size_multiple(self) -> int:
        """Both sides are multiples of this, in pixels."""
        patch = self.denoiser.config.get("patch_size") or 1
        return math.lcm(self.vae_factor * (patch if isinstance(patch, int) else patch[-1]), self.required_multiple)

    @property
    def trained_size(self) -> tuple[int, ...]:
        """([frames,] height, width) in pixels that the checkpoint was trained for, as far as its files tell."""
        side = int(self.denoiser.config.sample_size) * self.vae_factor
        return side, side

    @property
    def sample_size(self) -> tuple[int, ...]:
        """`trained_size`, or the entry `_default_size` of the denoiser's configuration, if it has one.

        For models of other sizes than their family's, where diffusers' configurations have no place for a size:
        `denoiser.register_to_config(_default_size=(9, 64, 64))`; diffusers keeps the entry and otherwise ignores it.
        """
        return tuple(self.denoiser.config.get("_default_size") or self.trained_size)

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was trained for."""
        height, width = self.sample_size[-2:]
        return height, width

    @property
    def default_frames(self) -> int | None:
        """Frames of a clip that the checkpoint was trained for; None for images."""
        return self.sample_size[0] if self.video else None

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        """Raise PipelineError unless VAE and denoiser take images, or clips of `frames`, of this size in pixels."""
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

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        """Number of tokens of a sample of this size: of packed latents, `size_multiple` pixels along each side."""
        latent_frames = ((frames or self.default_frames or 1) - 1) // self.frame_multiple + 1
        return latent_frames * height * width // self.size_multiple**2

    def shift_timesteps(self, shift: float | str, height: int, width: int, frames: int | None = None) -> None:
        """Choose the shift of a flow model's training times (see `RectifiedFlow`).

        Args:
            shift: "model" keeps the shift of the checkpoint's scheduler, which is none where its sampler shifts by
                resolution; "resolution" takes that sampler's shift for samples of this size; or a number.

        Raises:
            PipelineError: anything but "model" for a model without flow, "resolution" where there is no such rule.
        """
        if shift == "model":
            return
        if not isinstance(self.process, RectifiedFlow):
            raise PipelineError(f"a timestep shift of {shift!r} is for flow models; {self.family} has none")
        if shift == "resolution":
            if not self.resolution_shift:
                raise PipelineError(f"{self.family} has no timestep shift that depends on the resolution")
            shift = resolution_shift(self.pipe.scheduler.config, self.tokens(height, width, frames))
        self.process = RectifiedFlow(float(shift), self.process.span)
