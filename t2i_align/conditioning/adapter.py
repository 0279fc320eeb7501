"""What a run trains: an adapter beside the frozen denoiser, or all of the denoiser's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from diffusers.training_utils import cast_training_params
from torch import nn

from t2i_align.config import RunConfig

if TYPE_CHECKING:
    from pipelines import TrainablePipeline


Kind = Literal["lora", "soft_tokens", "model"]


class Trained(ABC):
    """One choice of what is trained. kind: `RunConfig.trains` names it, and so is the folder that a run leaves."""

    kind: ClassVar[Kind]

    @abstractmethod
    def install(self, pipeline: TrainablePipeline, config: RunConfig) -> None:
        """Put it on the denoiser with fresh weights in float32; only its parameters then require gradients."""

    def parameters(self, pipeline: TrainablePipeline) -> dict[str, nn.Parameter]:
        """The trained parameters, by their names in the denoiser."""
        return {name: p for name, p in pipeline.denoiser.named_parameters() if p.requires_grad}

    @abstractmethod
    def save(self, pipeline: TrainablePipeline, folder: Path) -> Path:
        """Write it into a folder; returns the file or folder that loads it."""


class Adapter(Trained):
    """What can be loaded onto a pipeline and removed again."""

    @abstractmethod
    def recognises(self, keys: Set[str]) -> bool:
        """Whether a file with these tensors holds such an adapter."""

    @abstractmethod
    def installed(self, pipeline: TrainablePipeline) -> bool:
        """Whether the denoiser carries one."""

    @abstractmethod
    def load(self, pipeline: TrainablePipeline, path: str | Path, *, scale: float = 1.0) -> None:
        """Put a saved one on the denoiser. Raises UserError or PipelineError where it does not fit."""

    @abstractmethod
    def remove(self, pipeline: TrainablePipeline) -> None:
        """Remove it; the denoiser is then as it was."""


class LoRA(Adapter):
    """Low-rank updates (arXiv 2106.09685) through peft, in diffusers' format."""

    kind = "lora"

    def install(self, pipeline: TrainablePipeline, config: RunConfig) -> None:
        pipeline.add_lora(**vars(config.lora))
        cast_training_params(pipeline.denoiser, dtype=torch.float32)

    def save(self, pipeline: TrainablePipeline, folder: Path) -> Path:
        return pipeline.save_lora(folder)

    def recognises(self, keys: Set[str]) -> bool:
        return any("lora" in key.lower() for key in keys)

    def installed(self, pipeline: TrainablePipeline) -> bool:
        return bool(getattr(pipeline.denoiser, "peft_config", None))

    def load(self, pipeline: TrainablePipeline, path: str | Path, *, scale: float = 1.0) -> None:
        pipeline.load_lora(path, scale=scale)

    def remove(self, pipeline: TrainablePipeline) -> None:
        pipeline.pipe.unload_lora_weights()


class WholeModel(Trained):
    """All of the denoiser's weights, saved as a whole pipeline."""

    kind = "model"

    def install(self, pipeline: TrainablePipeline, config: RunConfig) -> None:
        pipeline.denoiser.requires_grad_(True)

    def save(self, pipeline: TrainablePipeline, folder: Path) -> Path:
        pipeline.load_encoders()
        pipeline.save(folder)
        return folder
