"""What the video families share: a VAE over space and time, sizes of clips, and prompts through a T5."""

from __future__ import annotations

from pipelines.base import PipelineError
from pipelines.lora import ATTENTION, FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class VideoPipeline(TrainablePipeline):
    """A family of clips [B, F, 3, H, W] with latents [B, C, f, h, w].

    The first frame has a latent of its own, every further latent covers `temporal_factor` frames.
    """

    video = True
    resolution_shift = False
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {"attention": ATTENTION, "all": (*ATTENTION, *FEED_FORWARD)}

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        channels, *sides = super().latent_shape(height, width)
        return channels, ((frames or self.sample_size[0]) - 1) // self.temporal_factor + 1, *sides

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        widths = (config.get(name) for name in ("text_dim", "text_embed_dim", "caption_channels"))
        return {"prompt_embeds": (int(self.text_tokens or 0), next(filter(None, widths)))}

    def latent_times(self, frames: int, fps: float | None = None) -> list[float]:
        """When each latent frame of a clip is shown, in seconds: the mean of its frames' beginnings.

        fps: of the clip (default: the family's).
        """
        step, rate = self.temporal_factor, fps or self.fps
        return [0.0, *((last - (step - 1) / 2) / rate for last in range(step, frames, step))]

    @property
    def temporal_factor(self) -> int:
        """How many frames a latent frame covers, except for the first."""
        return self.frame_multiple

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        step = self.frame_multiple
        if frames is not None and (frames < 1 or (frames - 1) % step):
            below = max((frames - 1) // step, 0) * step + 1
            raise PipelineError(
                f"clips of {frames} frames do not fit {self.family} as {self.source} has it: "
                f"frames must be {step}k + 1; {below} and {below + step} fit"
            )
