"""DenseDPO: Diffusion-DPO on clips whose segments are judged one by one (arXiv 2506.03517, appendix E).

    h_f = -1/2 beta l_f [ (err_a - ref_err_a)_f - (err_b - ref_err_b)_f ],    l_f in {-1, 0, 1}

    per_frame   loss = mean of link(h_f) over the latent frames f with l_f != 0: the published form
    per_clip    loss = link(mean of h_f over them): Diffusion-DPO's where all l_f are equal

An error is a mean over a latent frame's elements; l_f is the sign of the difference of the two candidates' scores in
the segment that the frame lies in (`data.segments`). Frames without a preference change neither loss nor gradient, and
a clip without any has the loss 0. The paper pools the frames of a batch, which here would make a group's loss depend on
the others; its eq. 7 prints one sigmoid over the sum, which none of its numbers are from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Requirements
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.utils.settings import Count, Positive, settings


def decided_mean(values: Tensor, decided: Tensor, nothing: float = 0.0) -> Tensor:
    """The mean over the frames that are `decided` and have a number, [B, f] to [B]; `nothing` where there are none."""
    counted = decided & ~values.isnan()
    total = values.masked_fill(~counted, 0.0).sum(1)
    return torch.where(counted.any(1), total / counted.sum(1).clamp_min(1), nothing)


@settings
class DenseDPO(DiffusionDPO):
    """DenseDPO on pairs of clips with segment scores. beta: of errors that are means over a latent frame.

    variant: one link for each latent frame (`per_frame`), or one for the clip (`per_clip`).
    chunk: so many latent frames of each clip are trained on at a time, from a random place on (null: all of them). It
        bounds the memory of long clips; a chunk that begins later has no first frame of its own, which in these
        families stands alone in its latent frame. An even number for CogVideoX 1.5.
    """

    beta: Positive = 500.0
    variant: Literal["per_frame", "per_clip"] = "per_frame"
    chunk: Count | None = None

    name = "dense_dpo"
    paper = "arXiv 2506.03517"
    config = "wan21_dense_dpo_lora.yaml"
    needs = Requirements(candidates=2, reference=True, columns=("segment_scores", "segment_seconds"))

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        return super().step(policy, reference, self._chunk(batch, rng), rng)

    def compared(
        self,
        residuals: Tensor,
        against: Tensor | None,
        timesteps: Tensor,
        batch: Batch,
        rng: SampleRNG,
    ) -> tuple[Tensor, Metrics]:
        labels, channels = _labels(batch), batch.latents.shape[2]

        def pairs(values: Tensor) -> Tensor:  # [B, 2, D] to [B * f, 2, D / f]: each frame with its winner first
            frames = values.unflatten(2, (channels, labels.shape[1], -1)).movedim(3, 1)
            return torch.where(labels[:, :, None, None, None] < 0, frames.flip(2), frames).flatten(3).flatten(0, 1)

        times = timesteps.repeat_interleave(labels.shape[1])
        against = None if against is None else pairs(against)
        loss, metrics = super().compared(pairs(residuals), against, times, batch, rng)
        decided = labels != 0
        loss = decided_mean(loss.view_as(labels), decided)
        return loss, {name: decided_mean(of.view_as(labels), decided, torch.nan) for name, of in metrics.items()}

    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        if self.variant == "per_clip":
            decided = _labels(batch) != 0
            h = decided_mean(h.view_as(decided), decided)[:, None].expand_as(decided).flatten()
        return super().pair_loss(h, batch)

    def _chunk(self, batch: Batch, rng: SampleRNG) -> Batch:
        """So many latent frames of each clip, and their scores."""
        scores = batch.segment_scores
        if self.chunk is None or self.chunk >= scores.shape[-1]:
            return batch
        start = (rng.uniform("chunk") * (scores.shape[-1] - self.chunk + 1)).long()
        rows = torch.arange(len(start), device=start.device)[:, None]
        frames = start[:, None] + torch.arange(self.chunk, device=start.device)

        def cut(values: Tensor, dim: int) -> Tensor:
            return values.movedim(dim, 1)[rows, frames].movedim(1, dim)

        columns = {**batch.columns, "segment_scores": cut(scores, 2)}
        return replace(batch, latents=cut(batch.latents, 3), columns=columns)


def _labels(batch: Batch) -> Tensor:
    """l of each latent frame, [B, f]: 1 where the first candidate is preferred, -1 where the second is, 0 for a tie."""
    scores: Tensor = batch.segment_scores
    return (scores[:, 0] - scores[:, -1]).sign()
