"""What an objective with a scorer calls: clean latents and prompts in, differentiable scores out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from reward_scorers.base import Judgement, Scorer


def differentiable_scorer(spec: str) -> Scorer:
    """The scorer of a spec; raises UserError for one without gradient, naming it."""
    (scorer,) = build_scorers([spec])
    if not scorer.differentiable:
        raise UserError(
            f"objective.scorer {spec}: its scores have no gradient; choose another, such as clip or hpsv2.1"
        )
    return scorer


class Rewarder:
    """A scorer of decoded latents. The decoder is checkpointed: its activations would be the step's largest.

    latent_frames: of clips, so many from the beginning; None: all.
    """

    def __init__(self, pipeline: TrainablePipeline, scorer: Scorer, latent_frames: int | None = None) -> None:
        self.pipeline, self.scorer, self.latent_frames = pipeline, scorer, latent_frames

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Judgement:
        pixels = checkpoint(self.pipeline.decode, latents, self.latent_frames, use_reentrant=False)
        # Cut to [0, 1] as a saved image is, but with the gradient of pixels beyond: they could not return otherwise.
        pixels = pixels + (pixels.detach().clamp(0, 1) - pixels.detach())
        with torch.autocast(pixels.device.type, enabled=False):
            return self.scorer.judge(pixels.float(), prompts)

    def state(self) -> Tensor | None:
        """What the scorer has averaged so far, for a checkpoint: `denscore`'s direction, where it follows batches."""
        return getattr(self.scorer, "mean", None)

    def load_state(self, mean: Tensor | None) -> None:
        """Continue from a checkpoint."""
        if hasattr(self.scorer, "mean"):
            self.scorer.mean = mean
