"""SoftREPA: images and prompts of a batch are matched by the denoising error (arXiv 2503.08250).

    logits_ij = scale exp(-e_ij / temperature),    e_ij: the error of image i denoised under prompt j
    loss_i    = cross-entropy of logits_i with i  +  dweight e_ii

Published for soft tokens beside a frozen denoiser (`t2i_align.conditioning`); the loss itself knows nothing of them.
One time and one noise, those of the batch's first sample, serve all its pairs. So a loss depends on its batch:
splitting the batch changes it, as it does the negatives.

With the published temperature 0.07 the exponential is all but flat at errors of v and the flow (4 exp(-0.5 / 0.07) is
0.003), where only Adam's normalisation keeps the contrast alive, and not against dweight. Here it is the batch's mean
error unless set, which serves every prediction type and noise level. Equal prompts are no negatives and left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.data.batch import Batch, Conditioning, Model
from t2i_align.diffusion.noising import Noised, with_sizes
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.utils.settings import Count, NonNegative, Positive, settings


def contrastive_loss(errors: Tensor, other: Tensor, *, scale: float, temperature: float | Tensor) -> Tensor:
    """Loss [B] of errors [B, 1 + n], an image's own prompt first; other [B, 1 + n] is False at what to leave out."""
    logits = scale * torch.exp(-errors / temperature)
    return -F.log_softmax(logits.masked_fill(~other, -torch.inf), dim=1)[:, 0]


def shifted(conditioning: Conditioning, count: int) -> Conditioning:
    """Each sample's own prompt and those of the `count` samples after it, around the end, [B * (1 + count), ...]."""
    return {
        name: torch.stack([tensor.roll(-shift, 0) for shift in range(1 + count)], dim=1).flatten(0, 1)
        for name, tensor in conditioning.items()
    }


def different_prompts(conditioning: Conditioning, groups: int) -> Tensor:
    """Of `shifted` conditioning, which prompts are not the image's own (and the first, which is), [B, 1 + n]."""
    equal = torch.stack([
        (rows == rows[:, :1]).flatten(2).all(2)
        for rows in (tensor.unflatten(0, (groups, -1)) for tensor in conditioning.values())
    ]).all(0)  # fmt: skip
    different = ~equal
    different[:, 0] = True
    return different


@settings
class SoftREPA(Objective):
    """SoftREPA on the preferred candidates; ties and disliked samples are left out, as in SFT. Asks no reference.

    temperature: null takes the batch's mean error; published 0.07.
    dweight: of the image's own error; published 10 for SD1.5 and SDXL, 0 for SD3.
    negatives: how many other prompts per image is set against; null takes all. Forwards and memory grow with
        batch size x (1 + negatives).
    """

    scale: Positive = 4.0
    temperature: Positive | None = None
    dweight: NonNegative = 10.0
    negatives: Count | None = None

    name = "softrepa"
    paper = "arXiv 2503.08250"
    config = "sd15_softrepa.yaml"
    needs = Requirements(candidates=1, ties=False, likes_only=True)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        noised = self._noised(batch, rng)
        errors = noised.errors(policy)  # [B, 1 + n], the own prompt first
        other = different_prompts(noised.conditioning, len(errors))
        temperature = errors.detach().mean() if self.temperature is None else self.temperature
        contrast = contrastive_loss(errors, other, scale=self.scale, temperature=temperature)
        own, rest = errors[:, 0].detach(), errors[:, 1:].detach().masked_fill(~other[:, 1:], torch.nan)
        metrics = {
            "contrast/loss": contrast.detach(),
            "contrast/gap": rest.nanmean(1) - own,
            "contrast/accuracy": (rest > own.unsqueeze(1)).float().masked_fill(rest.isnan(), torch.nan).nanmean(1),
            "error/chosen": own,
        }
        return contrast + self.dweight * errors[:, 0], metrics

    def _noised(self, batch: Batch, rng: SampleRNG) -> Noised:
        """Every image once for each prompt that it is set against, all at one time and with one noise."""
        groups = len(batch.keys)
        if groups < 2:
            raise UserError("objective softrepa contrasts samples of a batch: train.batch_size must be 2 or more")
        count = min(self.negatives or groups, groups - 1)
        repeated = batch.take([0] * (1 + count))
        clean = repeated.latents.flatten(0, 1)
        noise = rng.normal("noise", clean.shape[1:])[:1].expand_as(clean)
        timesteps = rng.timesteps()[:1].expand(len(clean))
        conditioning = with_sizes(shifted(batch.conditioning, count), repeated)
        return Noised.at(rng.process, clean, noise, timesteps, conditioning, groups)
