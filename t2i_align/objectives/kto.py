"""Diffusion-KTO: likes and dislikes of single images through Kahneman and Tversky's utility (arXiv 2404.04465).

    g = 1/2 beta (ref_err - err),    z = max(0, mean g),    loss = lambda_y U( y (g - z) ),    y = +1 liked, -1 not

    U(v):   kahneman_tversky  1 - sigmoid(v)        loss_averse  -log sigmoid(v)        risk_seeking  log sigmoid(-v)

z is a mean over the whole batch, on all processes, without gradient; so a loss depends on its batch (splitting a
batch changes it), as in the released code. The paper's beta has no factor 1/2: its 5000 is 10000 here.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import NoiseSharing, random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.utils.settings import NonNegative, Positive, settings


def kto_loss(g: Tensor, liked: Tensor, z: Tensor, *, utility: str, desirable: float, undesirable: float) -> Tensor:
    """Loss of each sample, shaped like g; liked is boolean."""
    sign = torch.where(liked, 1.0, -1.0).to(g.dtype)
    v = sign * (g - z)
    loss = {"kahneman_tversky": lambda: torch.sigmoid(-v), "loss_averse": lambda: -F.logsigmoid(v),
            "risk_seeking": lambda: F.logsigmoid(-v)}[utility]()  # fmt: skip
    return torch.where(liked, desirable, undesirable).to(g.dtype) * loss


def liked_candidates(scores: Tensor) -> Tensor:
    """Which candidates count as liked, [B, k]: a single one by its sign, of several the best."""
    return scores > 0 if scores.shape[1] == 1 else scores == scores.max(dim=1, keepdim=True).values


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean over all processes' values, which are equally many, without gradient."""
    mean = values.detach().mean()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean)
        mean = mean / distributed.get_world_size()
    return mean


@settings
class DiffusionKTO(Objective):
    """Diffusion-KTO on single samples, or on groups, whose best candidates count as liked and the others as not.

    desirable, undesirable: lambda_y; leave them at 1 where the data's own balance is right.
    """

    beta: Positive = 10000.0
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky"
    desirable: NonNegative = 1.0
    undesirable: NonNegative = 1.0
    noise: NoiseSharing = "independent"

    name = "kto"
    paper = "arXiv 2404.04465"
    config = "sd15_kto.yaml"
    needs = Requirements(candidates=1, ties=False, reference=True, lists=True)

    def __post_init__(self) -> None:
        if self.desirable + self.undesirable == 0:
            raise UserError("objective.desirable and objective.undesirable must be 0 or more, and not both 0")

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        err, ref_err = random_noise(batch, rng, self.noise).errors_against(policy, reference)
        g = 0.5 * self.beta * (ref_err - err)
        z = mean_over_processes(g).clamp_min(0)
        liked = liked_candidates(batch.scores)
        loss = kto_loss(g, liked, z, utility=self.utility, desirable=self.desirable, undesirable=self.undesirable)
        metrics = {"kto/z": z.expand(len(g))}
        for side, mask in (("chosen", liked), ("rejected", ~liked)):
            metrics[f"rewards/{side}"] = mean_where(g.detach(), mask)
            metrics[f"error/{side}"] = mean_where(err.detach(), mask)
            metrics[f"error/{side}_minus_reference"] = mean_where((err - ref_err).detach(), mask)
        return loss.mean(1), metrics

    def errors_key(self) -> str | None:
        return f"mean over {self.noise} noise under the prompt"


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the chosen entries of each row, [B]; NaN where there is none."""
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)
