"""MaPO: margin-aware preferences without a reference (arXiv 2406.06424).

The paper and its released code define the score of an error e differently; both are here.

    paper   loss = err_w - 1/beta log sigmoid( phi(err_w) - phi(err_l) ),          phi(e) = (e / (exp(e) - 1))^beta
    code    loss = err_w - weight log sigmoid( scale (S(err_w) - S(err_l)) ),      S(e) = s e / (exp(s e) - 1), s = 1/2

The exponent of phi is reconstructed from a garbled print; it agrees with the paper's bounds (0, 1) and its gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import NoiseSharing, random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.objectives.pairwise import wins
from t2i_align.utils.settings import NonNegative, Positive, settings

SERIES_BELOW = 1e-3


def shrinking(e: Tensor) -> Tensor:
    """e / (exp(e) - 1), 1 at e = 0 and falling; a series near 0, where the quotient loses all digits."""
    small = e.abs() < SERIES_BELOW
    safe = torch.where(small, torch.ones_like(e), e)  # keeps the unused branch's gradient finite
    return torch.where(small, 1 - e / 2 + e.square() / 12, safe / torch.expm1(safe))


def mapo_loss(
    err_w: Tensor, err_l: Tensor, *, variant: str, beta: float, weight: float, scale: float, s: float
) -> tuple[Tensor, Tensor]:
    """Loss [B] and the margin inside the sigmoid [B]."""
    if variant == "paper":
        margin = shrinking(err_w) ** beta - shrinking(err_l) ** beta
        return err_w - F.logsigmoid(margin) / beta, margin
    margin = scale * (shrinking(s * err_w) - shrinking(s * err_l))
    return err_w - weight * F.logsigmoid(margin), margin


@settings
class MaPO(Objective):
    """MaPO on pairs.

    variant: `code` (weight, scale and s count) or `paper` (beta counts: the paper's best are 8 for preferences, 32
        for culture, 64 for safety and style, 1024 for personalisation; with mean errors of about 0.1 its preference
        term then vanishes, which leaves SFT).
    """

    variant: Literal["code", "paper"] = "code"
    beta: Positive = 8.0
    weight: NonNegative = 0.1
    scale: Positive = 1000.0
    s: Positive = 0.5
    noise: NoiseSharing = "shared"

    name = "mapo"
    paper = "arXiv 2406.06424"
    config = "sd15_mapo.yaml"
    needs = Requirements(candidates=2, ties=False)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        errors = random_noise(batch, rng, self.noise).errors(policy)
        err_w, err_l = errors[:, 0], errors[:, -1]
        loss, margin = mapo_loss(
            err_w, err_l, variant=self.variant, beta=self.beta, weight=self.weight, scale=self.scale, s=self.s
        )
        metrics = {
            "rewards/margins": margin,
            "rewards/accuracies": wins(margin),
            "error/chosen": err_w,
            "error/rejected": err_l,
        }
        return loss, {name: value.detach() for name, value in metrics.items()}
