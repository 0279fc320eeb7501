"""Samples and held-out scores during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torchvision.utils import make_grid, save_image

from t2i_align.config import RunConfig
from t2i_align.data.media import save_clip
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.inference.options import build_scorers, resolve_prompts

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

FRAMES_SHOWN = 8  # of a clip in the PNG


class Validation:
    """The same prompts and seeds each time: writes `validation/step_*.png` and returns each scorer's mean.

    Of clips the PNG shows some frames of one in a row, and `step_*.mp4` shows all of them side by side.

    Prompts and scorers are resolved at once, so that a wrong name fails before the first step. done: see `Callbacks`.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        done: Callable[[int, dict[str, float], torch.Tensor], object] | None = None,
    ) -> None:
        self.done = done
        self.options = config.validation
        self.folder = Path(config.output_dir) / "validation"
        self.prompts = resolve_prompts(self.options.prompts)[: self.options.count]
        self.seeds = [stable_seed(self.options.seed, i) % 2**32 for i in range(len(self.prompts))]
        self.scorers = []
        if self.options.scorers and accelerator.is_main_process:  # the one that validates
            self.scorers = [scorer.to(accelerator.device) for scorer in build_scorers(self.options.scorers)]
        for scorer in self.scorers:
            scorer.check_prompts(self.prompts)
        self.size, self.frames = config.data.size or (None, None), config.data.frames
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)

    def __call__(self, pipeline: TrainablePipeline, step: int) -> dict[str, float]:
        """Sample and score at `step`; {"validation/<scorer>": mean}, then "validation/<scorer>/<part>"."""
        pixels = pipeline.generate(
            self.prompts,
            self.seeds,
            steps=self.options.steps,
            guidance=self.options.guidance,
            batch_size=self.options.batch_size,
            height=self.size[0],
            width=self.size[1],
            frames=self.frames,
            autocast=self.autocast,
        )
        self.folder.mkdir(exist_ok=True)
        file, columns = self.folder / f"step_{step:06d}.png", max(1, round(len(pixels) ** 0.5))
        if pipeline.video:
            shown = pixels[:, :: math.ceil(pixels.shape[1] / FRAMES_SHOWN)]
            save_image(shown.flatten(0, 1), file, nrow=shown.shape[1])
            grids = torch.stack([make_grid(frame, nrow=columns) for frame in pixels.unbind(1)])
            save_clip(grids, file.with_suffix(".mp4"), pipeline.fps)
        else:
            save_image(pixels, file, nrow=columns)
        scores = {}
        for scorer in self.scorers:
            with torch.no_grad():
                total, parts = scorer.judge(pixels, self.prompts)
            means = {name: part.nanmean().item() for name, part in parts.items()}
            scores[f"validation/{scorer.name}"] = total.mean().item()
            scores |= {f"validation/{scorer.name}/{name}": mean for name, mean in means.items() if mean == mean}
        if self.done:
            self.done(step, scores, pixels)
        return scores
