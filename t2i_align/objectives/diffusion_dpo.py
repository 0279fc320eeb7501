"""Diffusion-DPO: raise the winner's likelihood over the loser's, measured against a reference (arXiv 2311.12908).

    h = -1/2 beta [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    loss = -log sigmoid(h)          (eq. 14)

T and the weight omega(lambda_t) are folded into beta, as in the paper. The error is the native target's: noise for
epsilon-, v for v-prediction and flow matching (Flow-DPO, arXiv 2501.13918, which reports that the derived weight
(1 - t)^2 is worse than none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from t2i_align.data.schema import Batch, Model
from t2i_align.errors import UserError
from t2i_align.noising import random_noise
from t2i_align.objectives.base import Metrics, Needs, Objective
from t2i_align.objectives.links import Link
from t2i_align.randomness import Draw


def dpo_logit(err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float) -> Tensor:
    """h of eq. 14, [B]; positive where the policy prefers the winner more than the reference does."""
    return -0.5 * beta * ((err_w - ref_err_w) - (err_l - ref_err_l))


def preference_metrics(
    err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float
) -> dict[str, Tensor]:
    """What is watched in a pairwise run, [B] each; both error differences rising together is the main failure."""
    chosen = -0.5 * beta * (err_w - ref_err_w)
    rejected = -0.5 * beta * (err_l - ref_err_l)
    margins = chosen - rejected
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "error/chosen": err_w,
        "error/rejected": err_l,
        "error/chosen_minus_reference": err_w - ref_err_w,
        "error/rejected_minus_reference": err_l - ref_err_l,
    }
    return {name: value.detach() for name, value in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO(Link, Objective):
    """Diffusion-DPO on pairs.

    beta: strength of the pull to the reference; the paper uses 2000 (SD1.5) and 5000 (SDXL) with mean errors.
        diffusers' script has no factor 1/2: its 2500 is 5000 here.
    reduction: `mean` over the latent's elements, as all released code; `sum` is the likelihood's own scale, where
        beta means the same at every resolution.
    noise: `shared` within a pair, as released, or `independent`.
    """

    beta: float = 2000.0
    reduction: Literal["mean", "sum"] = "mean"
    noise: Literal["shared", "independent"] = "shared"

    name = "diffusion_dpo"
    paper = "arXiv 2311.12908"
    needs = Needs(candidates=2, ties=False, reference=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive, found {self.beta!r}")

    def step(self, policy: Model, reference: Model, batch: Batch, draw: Draw) -> tuple[Tensor, Metrics]:
        noised = random_noise(batch, draw, self.noise)
        with torch.no_grad():  # first: its memory is free again before the policy's activations take theirs
            ref_err_w, ref_err_l = noised.errors(reference, self.reduction)[:, [0, -1]].unbind(1)
        err_w, err_l = noised.errors(policy, self.reduction)[:, [0, -1]].unbind(1)
        h = dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=self.beta)
        return self.loss(h), preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta=self.beta)
