"""A run of the genuine diffusers pipeline, and what it gave its scheduler: what a family is compared with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.base import Conditioning, PipelineError
from pipelines.pipeline import TrainablePipeline

PROMPTS = ("a red circle", "two blue squares")
SEEDS = (0, 1)
STEPS = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest value


@dataclass(frozen=True)
class Step:
    """What the genuine scheduler was given: noisy latents and a prediction as `predict` has them, [B, ...]."""

    noisy: Tensor
    timesteps: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Sampled:
    """A genuine run without guidance: its last latents and its images, and how it called the denoiser."""

    steps: list[Step]
    latents: Tensor
    pixels: Tensor
    conditioning: Conditioning
    call: tuple[Any, dict[str, Any]]


def genuine(pipeline: TrainablePipeline) -> Sampled:
    """Sample with the diffusers pipeline itself, from texts."""
    scheduler, denoiser = pipeline.pipe.scheduler, pipeline.denoiser
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    last: dict[str, Any] = {}
    step, scale = scheduler.step, getattr(scheduler, "scale_model_input", None)

    @functools.wraps(step)
    def spied_step(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(step).bind(*args, **kwargs).arguments
        noisy = last.pop("scaled", given["sample"])
        if last.pop("called", False):  # not by another expert's denoiser
            seen.append((noisy, torch.as_tensor(given["timestep"]), given["model_output"]))
        out = step(*args, **kwargs)
        last["latents"] = out[0] if isinstance(out, tuple) else out.prev_sample
        return out

    def spied_scale(sample: Tensor, *args: Any) -> Tensor:
        assert scale is not None
        last["scaled"] = scale(sample, *args)
        return last["scaled"]

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        last.update(called=True, call=(args, kwargs))

    handle = denoiser.register_forward_pre_hook(called, with_kwargs=True)
    scheduler.step = spied_step
    if scale is not None:
        scheduler.scale_model_input = spied_scale
    try:
        pixels = plain(pipeline, "pt")
    finally:
        handle.remove()
        for name in ("step", "scale_model_input"):
            vars(scheduler).pop(name, None)
    height, width = pipeline.default_size
    blank = torch.zeros(1, *((pipeline.default_frames or 1,) if pipeline.video else ()), 3, height, width)
    like = pipeline.encode_pixels(blank.to(pipeline.device)).repeat(len(PROMPTS), *([1] * (blank.ndim - 1)))
    natural = layout(pipeline, last["latents"], like, pixels)
    steps = [
        Step(natural(noisy), time.to(pipeline.device).expand(len(PROMPTS)), natural(prediction))
        for noisy, time, prediction in seen
    ]
    return Sampled(steps, natural(last["latents"]), pixels, pipeline.encode_prompts(PROMPTS), last["call"])


def layout(pipeline: TrainablePipeline, latents: Tensor, like: Tensor, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """How the scheduler's latents become those of `predict`: as they are, or packed as the denoiser's output is.

    Where several give the right shape, the one of whose latents the images are decoded.
    """
    choices: list[Callable[[Tensor], Tensor]] = [lambda latents: latents] if latents.shape == like.shape else []
    try:
        if pipeline.unpack(latents, like).shape == like.shape:
            choices.append(lambda latents: pipeline.unpack(latents, like))
            choices.append(lambda latents: -pipeline.unpack(latents, like))  # of a denoiser that predicts x - noise
    except Exception as error:  # of a denoiser whose output is no tensor
        if not choices:
            raise PipelineError(
                f"`unpack` cannot take the scheduler's latents {list(latents.shape)}: {error}"
            ) from error
    decoded = (choice for choice in choices if close(pipeline, pipeline.decode_latents(choice(latents)), pixels, 1.0))
    return next(decoded, choices[0])


def plain(pipeline: TrainablePipeline, output_type: str, pipe: Any = None, guidance: float = 1.0) -> Tensor:
    """Samples of the diffusers pipeline that is called with texts, at the family's size; guidance 1 is none."""
    height, width = pipeline.default_size
    options: dict[str, Any] = {"height": height, "width": width, "num_inference_steps": STEPS, **pipeline.call_options}
    if pipeline.video:
        options["num_frames"] = pipeline.default_frames
    if pipeline.text_tokens is not None:
        options["max_sequence_length"] = pipeline.text_tokens
    if pipeline.distilled_guidance:
        guidance = getattr(pipeline, "training_guidance", guidance)
    options["guidance_scale"] = guidance - 1 + pipeline.unguided
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with torch.no_grad():
        output = (pipe or pipeline.pipe)(list(PROMPTS), generator=generators, output_type=output_type, **options)
    return output.frames if pipeline.video else output.images


def difference(one: Tensor, other: Tensor, at_least: float = 0.0) -> float:
    """The largest difference as a share of the largest value, or of `at_least`."""
    scale = max(float(other.float().abs().max()), at_least) or 1.0
    return float((one.float() - other.float()).abs().max()) / scale


def close(pipeline: TrainablePipeline, one: Tensor, other: Tensor, at_least: float = 0.0) -> bool:
    """Whether tensors are equal up to the rounding of the denoiser's precision."""
    dtype = next(pipeline.denoiser.parameters()).dtype
    return one.shape == other.shape and difference(one, other.to(one.device), at_least) <= TOLERANCE.get(dtype, 1e-4)
