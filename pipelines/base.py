"""The contract of a model family: how its genuine diffusers pipeline is fed, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pipelines.process import ForwardProcess, RectifiedFlow, VariancePreserving, scheduler_shift

Conditioning = dict[str, Tensor]


class PipelineError(ValueError):
    """A checkpoint, size or option that a family cannot use; the message says what was expected and found."""


class Family(ABC):
    """A genuine diffusers pipeline with the pieces that training needs. Families subclass `TrainablePipeline`.

    Args:
        pipe: the loaded diffusers pipeline. Its text encoders and VAE may be None when only the denoiser is wanted.
        source: where it was loaded from, for messages and fingerprints.
        vae_config: the VAE's configuration, needed for sizes also when the VAE itself is not loaded.
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]  # names as they stand in model_index.json
    single_file_layouts: ClassVar[tuple[str, ...]] = ()  # diffusers' names for its layouts of single-file checkpoints
    load_options: ClassVar[Mapping[str, Any]] = {}  # more arguments of the pipeline's `from_pretrained`
    denoiser_name: str = "transformer"
    encoder_names: tuple[str, ...]  # components that a latent and embedding cache replaces
    text_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # what `encode_prompt` returns, "" what is not used
    optional_encoders: ClassVar[tuple[str, ...]] = ()  # of `encoder_names`, those that a checkpoint may lack
    large_encoders: ClassVar[tuple[str, ...]] = ()  # components of billions of parameters: `load` has a dtype for them
    experts: ClassVar[Mapping[str, str]] = {}  # where noise levels have their own denoisers: `load`'s name -> component
    flow: ClassVar[bool] = False  # rectified flow; otherwise variance preserving
    distilled_guidance: ClassVar[bool] = False  # the guidance scale is an input; there is no negative prompt
    conditioning_dtype: ClassVar[torch.dtype] = torch.float16  # in which a cache keeps the floats of the conditioning
    # Names of the conditioning's right-padded sequences, whose length differs between prompts -> those of their masks
    # [B, length]. A cache keeps them without padding; a batch has them as long as its longest.
    conditioning_masks: ClassVar[Mapping[str, str]] = {}
    size_conditioned: ClassVar[bool] = False  # `predict` reads each image's size and crop, as "time_ids" [B, 6]
    video: ClassVar[bool] = False  # clips [B, F, 3, H, W] instead of images [B, 3, H, W]
    fps: ClassVar[float] = 16.0  # frame rate of the clips, where it makes clips
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    kohya: ClassVar[bool] = False  # diffusers can convert its LoRA to kohya's names
    attention_backends: ClassVar[tuple[str, ...]] = ("native",)
    dispatches: ClassVar[bool] = False  # the denoiser's attention goes through diffusers' dispatcher
    feature_output: ClassVar[int] = 0  # of a feature block with several outputs, the image's

    process: ForwardProcess

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        missing = [name for name in (self.denoiser_name, "scheduler") if getattr(pipe, name, None) is None]
        if missing:
            raise PipelineError(f"{source}: the checkpoint lacks {', '.join(missing)}")
        self.pipe: Any = pipe  # diffusers sets its pipelines' attributes at run time
        self.source = source
        self.vae_config: Mapping[str, Any] = pipe.vae.config if vae_config is None else vae_config
        self.reload: Callable[[nn.Module], DiffusionPipeline] | None = None  # the whole pipeline around this denoiser
        if self.flow:
            self.process = RectifiedFlow(scheduler_shift(pipe.scheduler.config))
        else:
            self.process = VariancePreserving(pipe.scheduler.alphas_cumprod, pipe.scheduler.config.prediction_type)
        self.pipe.set_progress_bar_config(disable=True)
        for module in self.modules().values():
            module.requires_grad_(False)

    @property
    def denoiser(self) -> Any:
        """The network that is trained: an nn.Module with diffusers' adapters, checkpointing and configuration."""
        return getattr(self.pipe, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name, those that are loaded."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def has_encoders(self) -> bool:
        """Whether prompts and images can be encoded (False after `load(..., encoders=False)`)."""
        needed = [name for name in self.encoder_names if name not in self.optional_encoders]
        return all(getattr(self.pipe, name) is not None for name in needed)

    # What a family fills in -------------------------------------------------------------------------------------

    @property
    def text_options(self) -> dict[str, Any]:
        """Arguments of the diffusers pipeline's `encode_prompt` beside prompt and device."""
        return {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to batch-first tensors [B, ...] that `predict` understands and nothing else opens.

        Their names are those of the diffusers pipeline's arguments, so that `generate` can pass them on.
        """
        outputs = self.pipe.encode_prompt(list(prompts), device=self.device, **self.text_options)
        return {name: tensor for name, tensor in zip(self.text_outputs, outputs, strict=False) if name}

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], [B, 3, H, W] or clips [B, F, 3, H, W], to latents [B, C, h, w] or [B, C, f, h, w].

        Normalised as the denoiser expects them, not yet packed into tokens; deterministic: the posterior's mode.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [0, 1], [B, 3, H, W] or clips [B, F, 3, H, W]."""

    @abstractmethod
    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The denoiser's native prediction, shaped like `noisy_latents`.

        `denoiser` replaces `self.denoiser` where it is wrapped, compiled or a frozen copy.
        """

    def run(self, denoiser: nn.Module | None, *args: Any, **inputs: Any) -> Tensor:
        """The output of `denoiser`, or of the family's own where it is None; for `predict`."""
        output: Tensor = (denoiser or self.denoiser)(*args, **inputs, return_dict=False)[0]
        return output

    @abstractmethod
    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        """Raise PipelineError unless VAE and denoiser take images, or clips of `frames`, of this size in pixels."""

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was trained for."""

    @property
    def default_frames(self) -> int | None:
        """Frames of a clip that the checkpoint was trained for; None for images."""
        return None

    @property
    def own_size(self) -> tuple[int, ...] | None:
        """([frames,] height, width) from the entry `_default_size` of the denoiser's configuration, if it has one.

        For models of other sizes than their family's, where diffusers' configurations have no place for a size:
        `denoiser.register_to_config(_default_size=(9, 64, 64))`; diffusers keeps the entry and otherwise ignores it.
        """
        size = self.denoiser.config.get("_default_size")
        return None if size is None else tuple(size)

    @property
    def feature_block(self) -> str:
        """The module of the denoiser that `features` reads: the middle block."""
        return f"transformer_blocks.{self.denoiser.config.num_layers // 2}"

    @property
    def lora_options(self) -> dict[str, Any]:
        """Arguments with which the diffusers pipeline loads a LoRA onto this denoiser."""
        return {}

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        """Number of tokens of a sample of this size, for families whose sampler shifts its timesteps by that."""
        raise PipelineError(f"{self.family} has no timestep shift that depends on the resolution")
