"""All that families share, joined, and sampling: the genuine diffusers pipeline fed with what training sees."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pipelines.base import Conditioning, PipelineError
from pipelines.denoiser import DenoiserMixin
from pipelines.lora import LoRAMixin
from pipelines.vae import VAEMixin


class TrainablePipeline(LoRAMixin, DenoiserMixin, VAEMixin):
    """What the rest of a program holds: a family (`pipelines.base.Family`) and all that families share."""

    def sampling(
        self, steps: int | None = None, guidance: float | None = None, batch_size: int | None = None
    ) -> tuple[int, float, int]:
        """Steps, guidance scale and batch size; None is the diffusers pipeline's default, and 8 images or 1 clip."""
        defaults = inspect.signature(type(self.pipe).__call__).parameters
        if guidance is None:
            guidance = float(defaults["guidance_scale"].default) + 1 - self.unguided
        return steps or int(defaults["num_inference_steps"].default), guidance, batch_size or (1 if self.video else 8)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str] | Conditioning,
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
    ) -> Tensor:
        """Images [N, 3, H, W], or clips [N, F, 3, H, W] from video families, float32 in [0, 1] on the CPU.

        `prompts` may be their conditioning instead, [N, ...] as `encode_prompts` has it. Sample i is drawn from its own
        generator with seeds[i], so it does not depend on its neighbours. Sizes, steps and guidance: None is the
        model's own.

        Raises:
            PipelineError: a size the model cannot take, a negative prompt it has no use for, no encoders, or images
                that are not finite, naming prompt and seed.
        """
        if isinstance(prompts, Mapping):
            names = [f"number {i}" for i in range(len(next(iter(prompts.values()))))]
        else:
            names = [f"prompt {prompt!r}" for prompt in prompts]
        if len(names) != len(seeds):
            raise PipelineError(f"{len(names)} prompts but {len(seeds)} seeds; give one seed per prompt")
        if not self.has_encoders:
            raise PipelineError(f"{self.source}: loaded without its encoders; call load_encoders() to generate")
        if negative_prompt and self.distilled_guidance:
            raise PipelineError(f"{self.family} has distilled guidance and takes no negative prompt; leave it out")
        default_height, default_width = self.default_size
        height, width, frames = height or default_height, width or default_width, frames or self.default_frames
        self.check_size(height, width, frames)
        steps, guidance, batch_size = self.sampling(steps, guidance, batch_size)
        options: dict[str, Any] = {"height": height, "width": width, **({"num_frames": frames} if frames else {})}
        options |= {"guidance_scale": guidance - 1 + self.unguided, "num_inference_steps": steps, "output_type": "pt"}
        options |= self.call_options
        samples = [torch.empty(0, *((frames,) if frames else ()), 3, height, width)]
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            with torch.autocast(self.device.type, autocast) if autocast else nullcontext():
                guided = guidance > 1 and not self.distilled_guidance
                negative = self.encode_prompts([negative_prompt]) if guided else {}
                for start in range(0, len(names), batch_size):
                    rows = slice(start, start + batch_size)
                    generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
                    if isinstance(prompts, Mapping):
                        conditioning = {key: value[rows].to(self.device) for key, value in prompts.items()}
                    else:
                        conditioning = self.encode_prompts(prompts[rows])
                    inputs = self.call_inputs(conditioning)
                    if negative:
                        repeated = {key: row.expand(len(generators), *row.shape[1:]) for key, row in negative.items()}
                        inputs |= {f"negative_{key}": value for key, value in self.call_inputs(repeated).items()}
                    try:
                        with self.sampling_inputs(inputs) as arguments:
                            output = self.pipe(**arguments, **options, generator=generators)
                    except (AttributeError, TypeError, ValueError) as error:
                        if not isinstance(self._process, PipelineError):
                            raise
                        raise PipelineError(f"{self._process}; diffusers cannot sample with it: {error}") from error
                    pixels = (output.frames if self.video else output.images).float().cpu()
                    self._check_finite(pixels, names[rows], seeds[rows])
                    samples.append(pixels.clamp(0, 1))
        finally:
            self.denoiser.train(training)
        return torch.cat(samples)

    def _check_finite(self, samples: Tensor, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Saved as bytes, NaN would be a black image that scorers score like any other."""
        bad = [i for i, sample in enumerate(samples) if not sample.isfinite().all()]
        if bad:
            raise PipelineError(
                f"{len(bad)} of {len(samples)} {'clips' if self.video else 'images'} are not finite, as "
                f"{names[bad[0]]} with seed {seeds[bad[0]]}. The weights have diverged, or the VAE overflows in half "
                "precision: try float32."
            )
