"""The contract of a model family. A family fills in how its genuine diffusers pipeline is fed, and nothing else."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from diffusers.utils.import_utils import is_xformers_available
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.process import ForwardProcess, RectifiedFlow, resolution_shift

Conditioning = dict[str, Tensor]
LORA_FILE = "pytorch_lora_weights.safetensors"
# Of diffusers' attention dispatcher those that gradients pass: "sage" and "_flash_3" have no backward pass. The names
# in _hub fetch FlashAttention 2, or for Hopper GPUs 3, through the package kernels.
DISPATCHED_BACKENDS = ("native", "xformers", "flash", "flash_hub", "_flash_3_hub")


class PipelineError(ValueError):
    """A checkpoint, size or option that a family cannot use; the message says what was expected and found."""


class TrainablePipeline(ABC):
    """A genuine diffusers pipeline with the pieces that training needs.

    Args:
        pipe: the loaded diffusers pipeline. Its text encoders and VAE may be None when only the denoiser is wanted.
        source: where it was loaded from, for messages and fingerprints.
        vae_config: the VAE's configuration, needed for sizes also when the VAE itself is not loaded.
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]  # names as they stand in model_index.json
    denoiser_name: str
    encoder_names: tuple[str, ...]  # components that a latent and embedding cache replaces
    experts: ClassVar[Mapping[str, str]] = {}  # where denoisers share the way: `load`'s names for them -> components
    lora_presets: ClassVar[dict[str, tuple[str, ...]]]
    attention_backends: ClassVar[tuple[str, ...]] = ("native",)
    dispatches: ClassVar[bool] = False  # whether the denoiser's attention goes through diffusers' dispatcher
    optional_encoders: ClassVar[tuple[str, ...]] = ()  # of `encoder_names`, those that a checkpoint may do without
    large_encoders: ClassVar[tuple[str, ...]] = ()  # components of billions of parameters: `load` has a dtype for them
    video: ClassVar[bool] = False  # whether it makes clips [B, F, 3, H, W] instead of images [B, 3, H, W]
    fps: ClassVar[float] = 16.0  # frames a second of its clips, where it makes clips
    conditioning_dtype: ClassVar[torch.dtype] = torch.float16  # in which a cache keeps the floats of the conditioning
    # Names of the conditioning's right-padded sequences, whose length differs between prompts -> those of their masks
    # [B, length]. A cache keeps them without padding; a batch has them as long as its longest.
    conditioning_masks: ClassVar[Mapping[str, str]] = {}
    size_conditioned: ClassVar[bool] = False  # whether `predict` reads each image's size and crop, as "time_ids" [B, 6]
    kohya: ClassVar[bool] = False  # whether diffusers can convert its LoRA to kohya's names

    process: ForwardProcess

    def __init__(self, pipe: Any, source: str, vae_config: Mapping[str, Any] | None = None) -> None:
        missing = [name for name in (self.denoiser_name, "scheduler") if getattr(pipe, name, None) is None]
        if missing:
            raise PipelineError(f"{source}: the checkpoint lacks {', '.join(missing)}")
        self.pipe: Any = pipe  # diffusers builds its pipelines' attributes at run time
        self.source = source
        self.vae_config: Mapping[str, Any] = pipe.vae.config if vae_config is None else vae_config
        self.read_around: Callable[[nn.Module], DiffusionPipeline] | None = None  # the whole pipeline, this denoiser
        self.pipe.set_progress_bar_config(disable=True)
        for module in self.modules().values():
            module.requires_grad_(False)

    @property
    def denoiser(self) -> Any:
        """The network that is trained: an nn.Module with diffusers' adapters, checkpointing and configuration."""
        return getattr(self.pipe, self.denoiser_name)

    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name, those that are loaded."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    @property
    def has_encoders(self) -> bool:
        """Whether prompts and images can be encoded (False after `load(..., encoders=False)`)."""
        needed = [name for name in self.encoder_names if name not in self.optional_encoders]
        return all(getattr(self.pipe, name) is not None for name in needed)

    def load_encoders(self) -> None:
        """Bring in the components that `load(..., encoders=False)` left out, onto the denoiser's device."""
        if self.has_encoders:
            return
        if self.read_around is None:
            raise PipelineError(f"{self.source}: this pipeline has no encoders and no way to load them")
        # A whole new pipeline, not a patched one: diffusers derives sizes from the VAE when it is built.
        self.pipe = self.read_around(self.denoiser)
        self.pipe.set_progress_bar_config(disable=True)
        for name in self.encoder_names:
            if isinstance(part := getattr(self.pipe, name), nn.Module):
                part.requires_grad_(False).to(self.device)

    def drop_encoders(self) -> None:
        """Free VAE and text encoders once a cache stands in for them; `load_encoders` brings them back."""
        if self.read_around is not None:
            self.pipe.register_modules(**{name: None for name in self.encoder_names})
            torch.cuda.empty_cache()

    # What a family fills in -------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts to a dict of batch-first tensors [B, ...] that `predict` understands and nobody else opens."""

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

        `denoiser` stands in for `self.denoiser` where it is wrapped, compiled or a frozen copy.
        """

    @abstractmethod
    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        """Raise PipelineError unless VAE and denoiser take images, or clips of `frames`, of this size in pixels."""

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was trained for."""

    @property
    @abstractmethod
    def feature_block(self) -> str:
        """Where `features` reads the denoiser: a module's name in it."""

    @property
    def own_size(self) -> tuple[int, ...] | None:
        """([frames,] height, width) from the entry `_default_size` of the denoiser's configuration, if it has one.

        For models of other sizes than their family's, where diffusers' configurations have no place for a size:
        `denoiser.register_to_config(_default_size=(9, 64, 64))`; diffusers keeps the entry and otherwise ignores it.
        """
        size = self.denoiser.config.get("_default_size")
        return None if size is None else tuple(size)

    @property
    def default_frames(self) -> int | None:
        """Frames of a clip that the checkpoint was trained for; None where it makes images."""
        return None

    @property
    def default_steps(self) -> int:
        """Denoising steps that the diffusers pipeline takes by itself: 50 of Stable Diffusion, 28 of SD3 and FLUX."""
        return int(self._default("num_inference_steps"))

    @property
    def default_guidance(self) -> float:
        """Its guidance scale: 7.5 of Stable Diffusion, 5 of SDXL, 7 of SD3, 3.5 of FLUX, 5 of Wan."""
        return float(self._default("guidance_scale"))

    @property
    def default_batch_size(self) -> int:
        """Samples drawn at a time: a clip is as large as many images."""
        return 1 if self.video else 8

    def sampling(self, steps: int | None, guidance: float | None, batch_size: int | None) -> tuple[int, float, int]:
        """The three of them, the model's own where None."""
        guidance = self.default_guidance if guidance is None else guidance
        return steps or self.default_steps, guidance, batch_size or self.default_batch_size

    def _default(self, argument: str) -> Any:
        return inspect.signature(type(self.pipe).__call__).parameters[argument].default

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        """How many tokens the denoiser sees of a sample of this size, where its timesteps are shifted by that."""
        raise PipelineError(f"{self.family} has no timestep shift that depends on the resolution")

    def call_options(self, prompts: list[str], negative_prompt: str, guidance: float) -> dict[str, Any]:
        """How the diffusers pipeline is told prompts and guidance."""
        # None, not "": SDXL's unconditional embedding is zero only where no negative prompt is given at all.
        negative = [negative_prompt] * len(prompts) if negative_prompt else None
        return {"prompt": prompts, "negative_prompt": negative, "guidance_scale": guidance}

    # What is the same for all -----------------------------------------------------------------------------------

    def shift_timesteps(self, shift: float | str, height: int, width: int, frames: int | None = None) -> None:
        """Choose the shift of a flow model's training times (see `RectifiedFlow`).

        Args:
            shift: "model" leaves what the checkpoint's scheduler says, which is none where its sampler shifts by
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

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Samples through the genuine diffusers pipeline, float32 in [0, 1] on the CPU.

        Images [N, 3, H, W], or clips [N, F, 3, H, W] from video families. Sample i is drawn from its own generator
        with seeds[i], so it does not depend on its neighbours. Sizes, steps and guidance: None is the model's own.
        `on_batch` is told how many samples were just finished (for a progress bar).

        Raises:
            PipelineError: a size the model cannot take, or images that are not finite, naming prompt and seed.
        """
        if len(prompts) != len(seeds):
            raise PipelineError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt")
        default_height, default_width = self.default_size
        height, width = height or default_height, width or default_width
        frames = frames or self.default_frames
        steps, guidance, batch_size = self.sampling(steps, guidance, batch_size)
        self.check_size(height, width, frames)
        size = {"height": height, "width": width, **({"num_frames": frames} if self.video else {})}
        training = self.denoiser.training
        self.denoiser.eval()
        images = []
        try:
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
                with torch.autocast(self.device.type, autocast) if autocast else nullcontext():
                    output = self.pipe(
                        **self.call_options(part, negative_prompt, guidance),
                        **size,
                        num_inference_steps=steps,
                        generator=generators,
                        output_type="pt",
                    )
                made = (output.frames if self.video else output.images).float().cpu()
                self._check_finite(made, part, seeds[start : start + batch_size])
                images.append(made.clamp(0, 1))
                if on_batch is not None:
                    on_batch(len(part))
        finally:
            self.denoiser.train(training)
        shape = (frames, 3, height, width) if self.video else (3, height, width)
        return torch.cat(images) if images else torch.empty(0, *shape)

    def _check_finite(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Saved as bytes, NaN would be a black image that scorers score like any other."""
        bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise PipelineError(
                f"{len(bad)} of {len(prompts)} {'clips' if self.video else 'images'} are not finite, as prompt "
                f"{prompts[bad[0]]!r} with seed {seeds[bad[0]]}. The weights have diverged, or the VAE overflows in "
                "half precision: try float32."
            )

    def features(
        self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> Tensor:
        """What the denoiser computes at its `feature_block`, [B, ...]; the rest of it does not run.

        Gradients flow to `noisy_latents`, and to weights unless they are frozen. `denoiser` as in `predict`.
        """
        denoiser = denoiser or self.denoiser

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _Reached(self.feature_of(output))

        handle = denoiser.get_submodule(self.feature_block).register_forward_hook(stop)
        try:
            with _plainly_run(denoiser):
                self.predict(noisy_latents, timesteps, conditioning, denoiser)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise PipelineError(f"the denoiser never ran its block {self.feature_block!r}")

    def feature_of(self, output: Any) -> Tensor:
        """Of what the feature block returns, the part that belongs to the image."""
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.denoiser.parameters()).device

    def to(self, device: torch.device | str) -> TrainablePipeline:
        """Move every loaded network. Returns itself."""
        for module in self.modules().values():
            module.to(device)
        return self

    def add_lora(self, *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str]) -> None:
        """Put a fresh trainable LoRA (arXiv 2106.09685) on the denoiser; B starts at zero, so nothing changes yet."""
        modules: Any = {"target_modules": list(self.lora_targets(targets)), "lora_alpha": alpha}
        self.denoiser.add_adapter(LoraConfig(r=rank, lora_dropout=dropout, **modules))

    def lora_targets(self, targets: str | Sequence[str]) -> tuple[str, ...]:
        """Module-name endings for a preset's name or a list of endings, each checked against the denoiser."""
        if isinstance(targets, str):
            if targets not in self.lora_presets:
                raise PipelineError(
                    f"unknown LoRA targets {targets!r}. Choices for {self.family}: "
                    f"{', '.join(sorted(self.lora_presets))}, or a list of module-name endings."
                )
            return self.lora_presets[targets]
        names = [name for name, _ in self.denoiser.named_modules()]
        for ending in targets:
            if not any(name == ending or name.endswith("." + ending) for name in names):
                raise PipelineError(f"LoRA target {ending!r} matches no module of the {self.family} denoiser")
        return tuple(targets)

    def save_lora(self, directory: str | Path, naming: str = "diffusers") -> Path:
        """Write the LoRA as safetensors, with rank and alpha; returns the file.

        naming: of its keys. "diffusers" has all families; "kohya", which other tools read, those that have a UNet.
        """
        if naming not in ("diffusers", "kohya") or (naming == "kohya" and not self.kohya):
            choices = "diffusers, kohya" if self.kohya else "diffusers"
            raise PipelineError(f"a LoRA of {self.family} cannot be named as {naming!r} has it. Choices: {choices}.")
        adapter, lora = next(iter(self.denoiser.peft_config.items()))  # "default" where it was trained here
        weights = get_peft_model_state_dict(self.denoiser, adapter_name=adapter)
        file = Path(directory) / LORA_FILE
        component = type(self).denoiser_name  # also of a second expert, whose file diffusers cannot tell from a first's
        if naming == "diffusers":
            type(self.pipe).save_lora_weights(
                str(directory),
                **{f"{component}_lora_layers": weights, f"{component}_lora_adapter_metadata": lora.to_dict()},
            )
            return file
        named = convert_state_dict_to_kohya({f"{component}.{key}": value for key, value in weights.items()})
        # diffusers writes alpha = rank whatever alpha is, so that the LoRA would come back at another strength.
        alpha = torch.tensor(float(lora.lora_alpha))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: alpha.clone() if key.endswith(".alpha") else value.contiguous() for key, value in named.items()}, file
        )
        return file

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Load a LoRA (folder, file or Hub id) through diffusers and make it active at `scale`.

        Raises:
            PipelineError: nothing there, a damaged file, or weights that are not all of this denoiser.
        """
        local = Path(path)
        if local.exists() and local.is_dir() and not list(local.glob("*.safetensors")):
            raise PipelineError(f"{path}: no .safetensors file with LoRA weights in this folder")
        if "lora" in getattr(self.denoiser, "peft_config", {}):
            raise PipelineError(f"{path}: {self.source} already carries a LoRA that was loaded; unload it first")
        try:
            read = self.pipe.lora_state_dict(str(path))
            self.pipe.load_lora_weights(str(path), adapter_name="lora", **self.lora_options)
        except Exception as error:  # diffusers, peft and torch each raise their own for keys and shapes that do not fit
            self._forget_lora()
            reason = " ".join("; ".join(str(error).split("\n")[:2]).split())[:300]
            raise PipelineError(f"{path}: this LoRA does not fit {self.family} ({self.source}): {reason}") from error
        # Of keys that fit nothing diffusers only logs a warning.
        start = f"{type(self).denoiser_name}."
        given = sum(key.startswith(start) for key in (read[0] if isinstance(read, tuple) else read))
        on = "lora" in getattr(self.denoiser, "peft_config", {})
        taken = len(get_peft_model_state_dict(self.denoiser, adapter_name="lora")) if on else 0
        if not given or taken != given:
            self._forget_lora()
            raise PipelineError(
                f"{path}: this LoRA does not fit {self.family} ({self.source}): "
                + (f"{taken} of its {given} tensors do" if given else f"it has no weights for the {start[:-1]}")
            )
        self.pipe.set_adapters(["lora"], adapter_weights=[scale])

    @property
    def lora_options(self) -> dict[str, Any]:
        """What the diffusers pipeline must be told to load a LoRA onto this denoiser."""
        return {}

    def _forget_lora(self) -> None:
        if "lora" in getattr(self.denoiser, "peft_config", {}):
            self.denoiser.delete_adapters("lora")

    def save(self, directory: str | Path) -> None:
        """Write the whole pipeline in diffusers' format."""
        if not self.has_encoders:
            raise PipelineError("this pipeline was loaded without its encoders and cannot be saved as a whole")
        self.pipe.save_pretrained(str(directory), safe_serialization=True)

    def set_attention(self, backend: str) -> None:
        """Choose the attention kernel by name; anything that would be silently ignored is refused."""
        if backend not in self.attention_backends:
            raise PipelineError(
                f"attention backend {backend!r} is not usable with {self.family}. "
                f"Choices: {', '.join(self.attention_backends)}."
            )
        if backend != "native" and not torch.cuda.is_available():
            raise PipelineError(f"attention backend {backend!r} needs a CUDA GPU; use 'native'")
        if backend == "xformers" and not is_xformers_available():
            raise PipelineError("attention backend 'xformers' needs the package: pip install 't2i-align[xformers]'")
        if self.dispatches:  # also for "native": the dispatcher remembers the last choice of the whole process
            try:
                self.denoiser.set_attention_backend(backend)
            except (RuntimeError, ImportError, OSError) as error:
                raise PipelineError(f"attention backend {backend!r} cannot be used: {error}") from error
        elif backend == "xformers":
            self.denoiser.enable_xformers_memory_efficient_attention()

    def tile_vae(self) -> None:
        """From now on the VAE works through big images in tiles and through batches one by one: less memory."""
        self.pipe.vae.enable_tiling()
        self.pipe.vae.enable_slicing()

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """The denoiser's parameters that take gradients."""
        return (parameter for parameter in self.denoiser.parameters() if parameter.requires_grad)


class _Reached(Exception):
    """Ends a forward pass at the block whose output is wanted."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


@contextmanager
def _plainly_run(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser runs uncompiled, for compiled code does not see hooks; and without gradient checkpointing,
    which would run its blocks once more in the backward pass, when an adapter that is off now may be on again."""
    checkpointed = [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    compiled = getattr(denoiser, "_compiled_call_impl", None) is not None
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
