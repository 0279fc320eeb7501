"""What the video families share: a VAE over space and time, sizes of clips, and prompts through a T5."""

from __future__ import annotations

from pipelines.base import PipelineError
from pipelines.lora import ATTENTION, FEED_FORWARD
from pipelines.pipeline import TrainablePipeline


class VideoPipeline(TrainablePipeline):
    """A family of clips [B, F, 3, H, W] with latents [B, C, f, h, w].

    The first frame has a latent of its own, every further latent covers `frame_multiple` frames or a divisor of it.
    """

    video = True
    resolution_shift = False
    encoder_names: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    large_encoders = ("text_encoder",)
    lora_presets = {"attention": ATTENTION, "all": (*ATTENTION, *FEED_FORWARD)}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        widths = (config.get(name) for name in ("text_dim", "text_embed_dim", "caption_channels"))
        return {"prompt_embeds": (int(self.text_tokens or 0), next(filter(None, widths)))}

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        step = self.frame_multiple
        if frames is not None and (frames < 1 or (frames - 1) % step):
            below = max((frames - 1) // step, 0) * step + 1
            raise PipelineError(
                f"clips of {frames} frames do not fit {self.family} as {self.source} has it: "
                f"frames must be {step}k + 1; {below} and {below + step} fit"
            )
