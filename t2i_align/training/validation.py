"""Samples and held-out scores during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from t2i_align.config import RunConfig
from t2i_align.data.media import save_clip, to_bytes
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.inference.options import build_scorers, resolve_prompts
from t2i_align.training.sheet import contact_sheet
from t2i_align.utils.files import atomic_file, atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

FRAMES_SHOWN = 8  # of a clip in the PNG


class Validation:
    """The same prompts and seeds each time: writes `validation/step_*.png` and returns each scorer's mean.

    Each sample is shown beside that of step 0 (kept in `validation/before/`), with its prompt. Of clips the PNG shows
    some frames in a row, and `step_*.mp4` shows all of them side by side.

    Prompts and scorers are resolved at once, so that a wrong name fails before the first step; without
    `validation.prompts` they are the run's own, which `use` sets. done: see `Callbacks`.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        done: Callable[[int, dict[str, float], torch.Tensor], object] | None = None,
    ) -> None:
        self.done, self.accelerator = done, accelerator
        self.options = config.validation
        self.folder = Path(config.output_dir) / "validation"
        self.scorers = []
        if self.options.scorers and accelerator.is_main_process:  # the one that validates
            self.scorers = [scorer.to(accelerator.device) for scorer in build_scorers(self.options.scorers)]
        self.size, self.frames = config.data.size or (None, None), config.data.frames
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
        self.prompts: list[str] = []
        if self.options.prompts is not None:
            self.use(resolve_prompts(self.options.prompts)[: self.options.count])

    def use(self, prompts: Sequence[str]) -> None:
        """Validate on these prompts."""
        for scorer in self.scorers:
            scorer.check_prompts(prompts)
        self.prompts = list(prompts)

    def __call__(self, pipeline: TrainablePipeline, step: int) -> dict[str, float]:
        """Sample and score at `step`; {"validation/<scorer>": mean}, then "validation/<scorer>/<part>"."""
        seeds = [stable_seed(self.options.seed, i) % 2**32 for i in range(len(self.prompts))]
        pixels = pipeline.generate(
            self.prompts,
            seeds,
            steps=self.options.steps,
            guidance=self.options.guidance,
            batch_size=self.options.batch_size,
            height=self.size[0],
            width=self.size[1],
            frames=self.frames,
            autocast=self.autocast,
        )
        scores: dict[str, float] = {}
        if not self.accelerator.is_main_process:  # which draws only to give its part of sharded weights
            return scores
        self._show(pixels, step, pipeline)
        for scorer in self.scorers:
            with torch.no_grad():
                total, parts = scorer.judge(pixels, self.prompts)
            means = {name: part.nanmean().item() for name, part in parts.items()}
            scores[f"validation/{scorer.name}"] = total.mean().item()
            scores |= {f"validation/{scorer.name}/{name}": mean for name, mean in means.items() if mean == mean}
        if self.done:
            self.done(step, scores, pixels)
        return scores

    def _show(self, pixels: torch.Tensor, step: int, pipeline: TrainablePipeline) -> None:
        """Write the sheet, and of clips the video; trackers get the sheet as well."""
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"step_{step:06d}.png"
        if pipeline.video:
            shown = pixels[:, :: math.ceil(pixels.shape[1] / FRAMES_SHOWN)]
            images = [to_pil_image(torch.cat(list(clip), dim=-1)) for clip in to_bytes(shown)]
            columns = max(1, round(len(pixels) ** 0.5))
            grids = torch.stack([make_grid(frame, nrow=columns) for frame in pixels.unbind(1)])
            save_clip(grids, file.with_suffix(".mp4"), pipeline.fps)
        else:
            images = [to_pil_image(image) for image in to_bytes(pixels)]
        before = self._before(images, first=step == 0)
        sheet = contact_sheet(self.prompts, None if step == 0 else before, images, step)
        with atomic_file(file, sync=False) as temporary:
            sheet.save(temporary, format="PNG")
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **layout)

    def _before(self, images: Sequence[Image.Image], first: bool) -> list[Image.Image] | None:
        """The samples before training, which are written at first; None where other ones were drawn then."""
        folder = self.folder / "before"
        made = {"prompts": self.prompts, "seed": self.options.seed, "steps": self.options.steps,
                "guidance": self.options.guidance, "size": list(images[0].size)}  # fmt: skip
        if first:
            with atomic_folder(folder) as temporary:
                for index, image in enumerate(images):
                    image.save(temporary / f"{index:05d}.png")
                write_json(temporary / "samples.json", made)
        if not (folder / "samples.json").is_file() or read_json(folder / "samples.json") != made:
            return None
        return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]
