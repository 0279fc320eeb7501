"""What every family has beside its contract: its components loaded, moved and saved, and the mixins, joined."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

import torch
from torch import nn

from pipelines.attention import AttentionMixin
from pipelines.base import PipelineError
from pipelines.features import FeaturesMixin
from pipelines.generate import GenerateMixin
from pipelines.lora import LoRAMixin
from pipelines.process import RectifiedFlow, resolution_shift
from pipelines.vae import VAEMixin


class TrainablePipeline(GenerateMixin, LoRAMixin, FeaturesMixin, AttentionMixin, VAEMixin):
    """What the rest of a program holds: a family (`pipelines.base.Family`) and all that families share."""

    def load_encoders(self) -> Self:
        """Load the components that `load(..., encoders=False)` left out, onto the denoiser's device. Returns itself."""
        if self.has_encoders:
            return self
        if self.reload is None:
            raise PipelineError(f"{self.source}: this pipeline has no encoders and no way to load them")
        # A whole new pipeline, not a patched one: diffusers derives sizes from the VAE when it is built.
        self.pipe = self.reload(self.denoiser)
        self.pipe.set_progress_bar_config(disable=True)
        for name in self.encoder_names:
            if isinstance(part := getattr(self.pipe, name), nn.Module):
                part.requires_grad_(False).to(self.device)
        return self

    def drop_encoders(self) -> None:
        """Free VAE and text encoders once a cache replaces them; `load_encoders` brings them back."""
        if self.reload is not None:
            self.pipe.register_modules(**{name: None for name in self.encoder_names})
            torch.cuda.empty_cache()

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded network. Returns itself."""
        for module in self.modules().values():
            module.to(device)
        return self

    def save(self, directory: str | Path) -> None:
        """Write the whole pipeline in diffusers' format."""
        if not self.has_encoders:
            raise PipelineError("this pipeline was loaded without its encoders and cannot be saved as a whole")
        self.pipe.save_pretrained(str(directory), safe_serialization=True)

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The denoiser's parameters that take gradients."""
        return (parameter for parameter in self.denoiser.parameters() if parameter.requires_grad)

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
            shift = resolution_shift(self.pipe.scheduler.config, self.tokens(height, width, frames))
        self.process = RectifiedFlow(float(shift), self.process.span)
