"""What the video families share: a VAE over space and time, sizes of clips, and prompts through a T5."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

from pipelines.base import PipelineError
from pipelines.lora import ATTENTION, FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class VideoPipeline(TrainablePipeline):
    """A family of clips [B, F, 3, H, W] with latents [B, C, f, h, w].

    The first frame has a latent of its own, every further latent covers `frame_multiple` frames or a divisor of it.
    """

    video = True
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {"attention": ATTENTION, "all": (*ATTENTION, *FEED_FORWARD)}
    required_multiple: ClassVar[int] = 1  # the diffusers pipeline itself wants both sides to be multiples of this
    max_text_tokens: ClassVar[int]  # the pipeline's default

    @property
    @abstractmethod
    def clip_size(self) -> tuple[int, int, int]:
        """(frames, height, width) that the checkpoint was trained for, in pixels."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """(frames, pixels along one side) that a latent covers."""

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

    @property
    def text_options(self) -> dict[str, Any]:
        return {"do_classifier_free_guidance": False, "max_sequence_length": self.text_tokens}

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        step = self.frame_multiple
        if frames is not None and (frames < 1 or (frames - 1) % step):
            below = max((frames - 1) // step, 0) * step + 1
            raise PipelineError(
                f"clips of {frames} frames do not fit {self.family} as {self.source} has it: "
                f"frames must be {step}k + 1; {below} and {below + step} fit"
            )

    @property
    def size_multiple(self) -> int:
        patch = self.denoiser.config.patch_size
        patch = patch if isinstance(patch, int) else patch[-1]
        return math.lcm(self.vae_factor * patch, self.required_multiple)

    @property
    def default_size(self) -> tuple[int, int]:
        _, height, width = self.own_size or self.clip_size
        return height, width

    @property
    def default_frames(self) -> int:
        return (self.own_size or self.clip_size)[0]
