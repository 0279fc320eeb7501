"""What the video families share: a VAE over space and time, the sizes of clips, and prompts through a T5."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pipelines.base import Conditioning, PipelineError
from pipelines.lora import ATTENTION, FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class VideoPipeline(TrainablePipeline):
    """A family of clips [B, F, 3, H, W]. Its latents [B, C, f, h, w] are (z - shift) x scale.

    The first frame has a latent of its own, every further latent covers `frame_multiple` frames or a divisor of it.
    """

    video = True
    denoiser_name = "transformer"
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {"attention": ATTENTION, "all": (*ATTENTION, *FEED_FORWARD)}
    required_multiple: ClassVar[int] = 1  # the diffusers pipeline itself wants both sides to be multiples of this
    max_text_tokens: ClassVar[int]  # the pipeline's default

    # What a family fills in -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def clip_size(self) -> tuple[int, int, int]:
        """(frames, height, width) that the checkpoint was trained for, in pixels."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along one side) that a latent covers."""

    @abstractmethod
    def normalisation(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale), each a number or shaped to multiply with `latents`."""

    def decode_raw(self, latents: Tensor) -> Tensor:
        """The VAE's output [B, 3, F, H, W] for latents that are no longer normalised."""
        pixels: Tensor = self.pipe.vae.decode(latents).sample
        return pixels

    # What is the same for all -----------------------------------------------------------------------------------

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along one side."""
        return self.compression[1]

    @property
    def frame_multiple(self) -> int:
        """Clips have k x this + 1 frames."""
        return self.compression[0]

    @property
    def text_tokens(self) -> int:
        """The number of tokens that prompts are cut or padded to."""
        return min(self.max_text_tokens, self.pipe.tokenizer.model_max_length)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        embeddings, *_ = self.pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
            device=self.device,
        )
        return {"prompt_embeds": embeddings}

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 5:
            raise PipelineError(f"{self.family} takes clips [B, F, 3, H, W], found {list(pixels.shape)}")
        vae = self.pipe.vae
        self.check_size(pixels.shape[-2], pixels.shape[-1], pixels.shape[1])
        clips = (2 * pixels - 1).transpose(1, 2).split(1)  # one by one: a clip alone fills a lot of memory
        latents = torch.cat([vae.encode(clip.to(vae.device, vae.dtype)).latent_dist.mode() for clip in clips])
        shift, scale = self.normalisation(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        shift, scale = self.normalisation(latents)
        raw = (latents / scale + shift).to(vae.device, vae.dtype)
        clips = torch.cat([self.decode_raw(clip) for clip in raw.split(1)])
        return (clips.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        if frames is None:
            raise PipelineError(f"{self.family} makes clips: give their number of frames")
        patch = self.denoiser.config.patch_size
        multiple = math.lcm(self.vae_factor * (patch if isinstance(patch, int) else patch[-1]), self.required_multiple)
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise PipelineError(
                f"clips of {height} x {width} pixels do not fit {self.family} as {self.source} has it: "
                f"both sides must be multiples of {multiple}"
            )
        step = self.frame_multiple
        if frames < 1 or (frames - 1) % step:
            below = max((frames - 1) // step, 0) * step + 1
            raise PipelineError(
                f"clips of {frames} frames do not fit {self.family} as {self.source} has it: "
                f"frames must be {step}k + 1; {below} and {below + step} fit"
            )

    @property
    def default_size(self) -> tuple[int, int]:
        _, height, width = self.own_size or self.clip_size
        return height, width

    @property
    def default_frames(self) -> int:
        return (self.own_size or self.clip_size)[0]
