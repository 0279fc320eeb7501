"""What a run trains: an adapter beside the frozen denoiser, or all of the denoiser's weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from diffusers.training_utils import cast_training_params

from t2i_align.conditioning import personal, t5
from t2i_align.conditioning.soft_tokens import SoftTokensAdapter
from t2i_align.config import RunConfig

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from t2i_align.conditioning.personal import Embedding

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
Kind = Literal["lora", "soft_tokens", "personal", "t5", "model"]


class Trained(Protocol):
    """One choice of what is trained, listed in TRAINED under the name of the folder that a run leaves."""

    def install(
        self, pipeline: TrainablePipeline, config: RunConfig, unreached: Set[str], embedding: Embedding | None
    ) -> None:
        """Put it on the denoiser with fresh weights in float32; only its parameters then require gradients.

        unreached: names of the denoiser's parameters that get no gradient. They are not trained: several processes
        would wait for their gradients. embedding: of the data's users, where they have one.
        """

    def save(self, pipeline: TrainablePipeline, folder: Path, dtype: torch.dtype | None = None) -> Path:
        """Write it into a folder; returns the file or folder that loads it. dtype: of a LoRA's tensors."""


class Adapter(Trained, Protocol):
    """What can be loaded onto a pipeline and removed again; listed in ADAPTERS."""

    def recognises(self, keys: Set[str]) -> bool:
        """Whether a file with these tensors holds such an adapter."""

    def installed(self, pipeline: TrainablePipeline) -> bool:
        """Whether the denoiser carries one."""

    def load(self, pipeline: TrainablePipeline, path: str | Path, *, scale: float = 1.0) -> None:
        """Put a saved one on the denoiser. Raises UserError or PipelineError where it does not fit."""

    def remove(self, pipeline: TrainablePipeline) -> None:
        """Remove it; the denoiser is then as it was."""


class LoRA:
    """Low-rank updates (arXiv 2106.09685) through peft, in diffusers' format."""

    def install(
        self, pipeline: TrainablePipeline, config: RunConfig, unreached: Set[str], embedding: Embedding | None
    ) -> None:
        assert config.lora is not None
        options = {key: value for key, value in vars(config.lora).items() if key != "save_precision"}
        pipeline.add_lora(**options, without=unreached)
        cast_training_params(pipeline.denoiser, dtype=torch.float32)

    def save(self, pipeline: TrainablePipeline, folder: Path, dtype: torch.dtype | None = None) -> Path:
        return pipeline.save_lora(folder, dtype=dtype)

    def recognises(self, keys: Set[str]) -> bool:
        return any(part in key.lower() for key in keys for part in ("lora", "lycoris", "hada_w1", "lokr_w1"))

    def installed(self, pipeline: TrainablePipeline) -> bool:
        return bool(getattr(pipeline.denoiser, "peft_config", None))

    def load(self, pipeline: TrainablePipeline, path: str | Path, *, scale: float = 1.0) -> None:
        pipeline.load_lora(path, scale=scale)

    def remove(self, pipeline: TrainablePipeline) -> None:
        pipeline.pipe.unload_lora_weights()


class BesideLoRA(LoRA, ABC):
    """An adapter of its own module, with a LoRA or without, which is then a file of its own beside it.

    module: with `NAME`, of the denoiser's part, and `save` and `load`.
    """

    module: Any

    @abstractmethod
    def attach(self, pipeline: TrainablePipeline, embedding: Embedding | None) -> None:
        """Put the module on the denoiser with fresh weights."""

    def install(
        self, pipeline: TrainablePipeline, config: RunConfig, unreached: Set[str], embedding: Embedding | None
    ) -> None:
        pipeline.denoiser.requires_grad_(False)
        if config.lora:
            super().install(pipeline, config, unreached, embedding)
        self.attach(pipeline, embedding)

    def save(self, pipeline: TrainablePipeline, folder: Path, dtype: torch.dtype | None = None) -> Path:
        if super().installed(pipeline):
            super().save(pipeline, folder, dtype)
        file: Path = self.module.save(pipeline.denoiser, folder)
        return file

    def installed(self, pipeline: TrainablePipeline) -> bool:
        return hasattr(pipeline.denoiser, self.module.NAME)

    def load(self, pipeline: TrainablePipeline, path: str | Path, *, scale: float = 1.0) -> None:
        """scale: of the LoRA."""
        if (lora := Path(path).parent / LORA_FILE).is_file():
            super().load(pipeline, lora, scale=scale)
        try:
            self.module.load(pipeline, path)
        except BaseException:
            if super().installed(pipeline):
                super().remove(pipeline)
            raise

    def remove(self, pipeline: TrainablePipeline) -> None:
        self.take_off(pipeline)
        if super().installed(pipeline):
            super().remove(pipeline)

    def take_off(self, pipeline: TrainablePipeline) -> None:
        """Remove the module from the denoiser."""
        delattr(pipeline.denoiser, self.module.NAME)


class PersonalAdapter(BesideLoRA):
    """A personal branch; see `personal.serving` for its scale."""

    module = personal

    def attach(self, pipeline: TrainablePipeline, embedding: Embedding | None) -> None:
        assert embedding is not None
        personal.install(pipeline, embedding)

    def recognises(self, keys: Set[str]) -> bool:
        return "encoder.hidden.weight" in keys and "user_v.0.weight" in keys

    def take_off(self, pipeline: TrainablePipeline) -> None:
        personal.remove(pipeline)


class T5(BesideLoRA):
    """The MLP between a T5 and the denoiser."""

    module = t5

    def attach(self, pipeline: TrainablePipeline, embedding: Embedding | None) -> None:
        width = pipeline.denoiser.config.cross_attention_dim
        t5.attach(pipeline.denoiser, t5.T5Adapter(t5.pipeline_t5(pipeline).features, width))

    def recognises(self, keys: Set[str]) -> bool:
        return keys == t5.KEYS

    def installed(self, pipeline: TrainablePipeline) -> bool:
        return super().installed(pipeline) and not getattr(pipeline.denoiser, t5.NAME).base


class WholeModel:
    """All of the denoiser's weights, saved as a whole pipeline."""

    def install(
        self, pipeline: TrainablePipeline, config: RunConfig, unreached: Set[str], embedding: Embedding | None
    ) -> None:
        for name, parameter in pipeline.denoiser.named_parameters():
            parameter.requires_grad_(name not in unreached)

    def save(self, pipeline: TrainablePipeline, folder: Path, dtype: torch.dtype | None = None) -> Path:
        had_encoders = pipeline.has_encoders
        pipeline.load_encoders().save(folder)
        if not had_encoders:
            pipeline.drop_encoders()
        return folder


ADAPTERS: dict[Kind, Adapter] = {
    "personal": PersonalAdapter(), "t5": T5(), "lora": LoRA(), "soft_tokens": SoftTokensAdapter(),
}  # fmt: skip
TRAINED: dict[Kind, Trained] = {**ADAPTERS, "model": WholeModel()}


def files_of(kind: Kind, path: str | Path) -> list[Path]:
    """The files that an adapter is loaded from: its own, and that of a LoRA which belongs to it."""
    beside = Path(path).with_name(LORA_FILE)
    return [Path(path), beside] if isinstance(ADAPTERS[kind], BesideLoRA) and beside.is_file() else [Path(path)]
