"""The contract of a model family: how its genuine diffusers pipeline is fed, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from pipelines.offload import by_groups
from pipelines.process import ForwardProcess, process_of

Conditioning = dict[str, Tensor]


class PipelineError(ValueError):
    """A checkpoint, size or option that a family cannot use; the message says what was expected and found."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # all that IPython and Jupyter show


class Family:
    """A genuine diffusers pipeline with the pieces that training needs. Families subclass `TrainablePipeline`.

    A family sets the attributes below and overrides what differs in `denoiser_inputs`, `unpack`, and in `vae.py`.

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
    experts: ClassVar[Mapping[str, str]] = {}  # where noise levels have their own denoisers: `load`'s name -> component
    flow: ClassVar[bool] = False  # rectified flow; otherwise variance preserving
    span: tuple[float, float] = (0.0, 1.0)  # the sigmas that the denoiser serves
    resolution_shift: ClassVar[bool] = True  # its sampler may shift times by a sample's number of tokens
    distilled_guidance: ClassVar[bool] = False  # the guidance scale is an input; there is no negative prompt
    unguided: ClassVar[float] = 1.0  # its pipeline's guidance scale without guidance; here that is 1 in every family
    call_options: ClassVar[Mapping[str, Any]] = {}  # more arguments of its pipeline's call
    video: ClassVar[bool] = False  # clips [B, F, 3, H, W] instead of images [B, 3, H, W]
    fps: ClassVar[float] = 16.0  # frame rate of the clips, where it makes clips
    # Text and other conditioning
    encoder_names: tuple[str, ...]  # components that a latent and embedding cache replaces
    optional_encoders: ClassVar[tuple[str, ...]] = ()  # of `encoder_names`, those that a checkpoint may lack
    large_encoders: ClassVar[tuple[str, ...]] = ()  # components of billions of parameters: `load` has a dtype for them
    text_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}  # more for `encode_prompt`
    text_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # what `encode_prompt` returns, "" what is not used
    t5_tokenizer: ClassVar[str] = "tokenizer"
    t5_tokens: ClassVar[int | None] = None  # to which a T5's prompts are cut or padded: the pipeline's default
    conditioning_dtype: ClassVar[torch.dtype] = torch.float16  # in which a cache keeps the floats of the conditioning
    # Names of the conditioning's right-padded sequences, whose length differs between prompts -> those of their masks
    # [B, length]. A cache keeps them without padding; a batch has them as long as its longest.
    conditioning_masks: Mapping[str, str] = {}
    size_conditioned: ClassVar[bool] = False  # `predict` reads each image's size and crop, as "time_ids" [B, 6]
    # The denoiser
    attention_backends: ClassVar[tuple[str, ...]] = ("native",)
    dispatches: ClassVar[bool] = False  # the denoiser's attention goes through diffusers' dispatcher
    feature_output: ClassVar[int] = 0  # of a feature block with several outputs, the image's

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        missing = [name for name in (self.denoiser_name, "scheduler") if getattr(pipe, name, None) is None]
        if missing:
            raise PipelineError(f"{source}: the checkpoint lacks {', '.join(missing)}")
        self.pipe: Any = pipe  # diffusers sets its pipelines' attributes at run time
        self.source = source
        self.vae_config: Mapping[str, Any] = pipe.vae.config if vae_config is None else vae_config
        self.reload: Callable[[nn.Module], DiffusionPipeline] | None = None  # the whole pipeline around this denoiser
        self.offloads_encoders = False  # whether VAE and text encoders lie in CPU memory (see `pipelines.offload`)
        self.adapter_inputs: Sequence[str] = ()  # of the conditioning, what an adapter takes from the denoiser's call
        self.long_prompts: Callable[[Sequence[str]], Conditioning] | None = None  # in place of `encode_texts`
        self._process: ForwardProcess | PipelineError
        try:
            self._process = process_of(pipe.scheduler, flow=self.flow, span=self.span)
        except ValueError as error:  # raised where training needs it: such a model can still be sampled
            self._process = PipelineError(f"{source}: the checkpoint's scheduler cannot be trained with: {error}")
        self.pipe.set_progress_bar_config(disable=True)
        for module in self.modules().values():
            module.requires_grad_(False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {self.process.prediction_type})"

    # Components ---------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Any:
        """The network that is trained: an nn.Module with diffusers' adapters, checkpointing and configuration."""
        return getattr(self.pipe, self.denoiser_name)

    def denoiser_at(self, timestep: float) -> Any:
        """The network that serves a time: where there is one for each part of the way, that part's."""
        return self.denoiser

    @property
    def process(self) -> ForwardProcess:
        """The forward process of training; raises PipelineError if the checkpoint's scheduler is of another kind."""
        if isinstance(self._process, PipelineError):
            raise self._process
        return self._process

    @process.setter
    def process(self, process: ForwardProcess) -> None:
        self._process = process

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name, those that are loaded."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The denoiser's parameters that take gradients."""
        return (parameter for parameter in self.denoiser.parameters() if parameter.requires_grad)

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded network. Returns itself."""
        for name, module in self.modules().items():
            self._place(name, module, torch.device(device))
        return self

    def _place(self, name: str, module: nn.Module, device: torch.device) -> None:
        if self.offloads_encoders and name in self.encoder_names:
            by_groups(module, device, ahead=name != "vae")
        else:
            module.to(device)

    @property
    def has_encoders(self) -> bool:
        """Whether prompts and images can be encoded (False after `load(..., encoders=False)`)."""
        needed = [name for name in self.encoder_names if name not in self.optional_encoders]
        return all(getattr(self.pipe, name) is not None for name in needed)

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
                self._place(name, part.requires_grad_(False), self.device)
        return self

    def drop_encoders(self) -> None:
        """Free VAE and text encoders once a cache replaces them; `load_encoders` brings them back."""
        if self.reload is not None:
            self.pipe.register_modules(**dict.fromkeys(self.encoder_names))
            torch.cuda.empty_cache()

    def save(self, directory: str | Path) -> None:
        """Write the whole pipeline in diffusers' format."""
        if not self.has_encoders:
            raise PipelineError("this pipeline was loaded without its encoders and cannot be saved as a whole")
        self.pipe.save_pretrained(str(directory), safe_serialization=True)
        for file in Path(directory).rglob("*.safetensors"):  # which are written for their owner alone
            file.chmod((Path(directory) / "model_index.json").stat().st_mode)

    # Text and prediction ------------------------------------------------------------------------------------------

    @property
    def text_tokens(self) -> int | None:
        """The number of tokens that a T5's prompts are cut or padded to, if it has one."""
        tokenizer = getattr(self.pipe, self.t5_tokenizer)  # None where the T5 is optional and left out
        if self.t5_tokens is None or tokenizer is None:
            return self.t5_tokens
        return min(self.t5_tokens, int(tokenizer.model_max_length))

    def tokenize(self, texts: Sequence[str]) -> dict[tuple[str, int], list[list[int]]]:
        """All tokens of each text by tokenizer and by how many of them its encoder reads at most.

        With `long_prompts` all are read.
        """
        names = [name for name in self.encoder_names if name.startswith("tokenizer") and getattr(self.pipe, name, None)]
        tokens = {}
        for name in names:
            tokenizer = getattr(self.pipe, name)
            limit = self.text_tokens if name == self.t5_tokenizer else None
            limit = sys.maxsize if self.long_prompts else limit or int(tokenizer.model_max_length)
            tokens[name, limit] = tokenizer(list(texts), verbose=False)["input_ids"]
        return tokens

    def tokens_read(self, texts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """What the text encoders see of each text; equal for texts that differ only in case or beyond the limits."""
        # The last token marks the end, also of a text that is cut.
        read = [
            [(*ids[: limit - 1], *ids[limit - 1 :][-1:]) for ids in all]
            for (_, limit), all in self.tokenize(texts).items()
        ]
        return list(zip(*read, strict=True))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to batch-first tensors [B, ...] that `predict` understands and nothing else opens.

        Their names are those of the diffusers pipeline's arguments, so that `generate` can pass them on. A family whose
        encoder cuts prompts off can be given another way to encode them, `long_prompts`.
        """
        return (self.long_prompts or self.encode_texts)(prompts)

    @torch.no_grad()
    def encode_texts(self, prompts: Sequence[str]) -> Conditioning:
        """The same by the diffusers pipeline's own `encode_prompt`, which cuts off what its encoders cannot read."""
        length = {} if self.text_tokens is None else {"max_sequence_length": self.text_tokens}
        outputs = self.pipe.encode_prompt(list(prompts), device=self.device, **self.text_options, **length)
        return {name: tensor for name, tensor in zip(self.text_outputs, outputs, strict=False) if name}

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's conditioning, without its masks; here those of the empty prompt, encoded.

        A family that knows them from its configurations overrides this, and can then be planned for without weights.
        """
        encoded = self.load_encoders().encode_prompts([""])
        return {name: tuple(t.shape[1:]) for name, t in encoded.items() if name not in self.conditioning_masks.values()}

    @property
    def clip_tokens(self) -> int:
        """The number of tokens that a CLIP's prompts are cut or padded to: 77, unless its tokenizer is another."""
        return 77 if self.pipe.tokenizer is None else int(self.pipe.tokenizer.model_max_length)

    def call_inputs(self, conditioning: Conditioning) -> dict[str, Any]:
        """Conditioning [B, ...] as the diffusers pipeline's call takes it; its negative has the same names."""
        return dict(conditioning)

    def predict(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The denoiser's native prediction, shaped like `noisy_latents`.

        `denoiser` replaces `self.denoiser` where it is wrapped, compiled or a frozen copy.
        """
        inputs = self.denoiser_inputs(noisy_latents, timesteps, conditioning)
        inputs |= {name: conditioning[name] for name in self.adapter_inputs if name in conditioning}
        output: Tensor = (denoiser or self.denoiser)(**inputs, return_dict=False)[0]
        return self.unpack(output, noisy_latents)

    def denoiser_inputs(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The arguments of the denoiser's forward pass."""
        embeddings = conditioning["prompt_embeds"]
        return {"hidden_states": noisy_latents, "timestep": timesteps, "encoder_hidden_states": embeddings}

    def unpack(self, output: Tensor, noisy_latents: Tensor) -> Tensor:
        """The denoiser's output in the shape of `noisy_latents`."""
        return output

    @contextmanager
    def sampling_inputs(self, inputs: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """What the diffusers pipeline is given of the conditioning, and what else it needs while it samples."""
        yield inputs

    @property
    def feature_block(self) -> str:
        """The module of the denoiser that `features` reads: the middle block."""
        return f"transformer_blocks.{self.denoiser.config.num_layers // 2}"

    @property
    def lora_options(self) -> dict[str, Any]:
        """Arguments with which the diffusers pipeline loads a LoRA onto this denoiser."""
        return {}
