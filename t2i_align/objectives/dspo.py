"""DSPO: the winner's score is matched to the data's, tilted by the preference (ICLR 2025, OpenReview xyfb9HHvMe).

    loss = mean over D of [ (pred_w - target_w) - beta (1 - sigmoid(h)) (pred_w - ref_pred_w) ]^2

with Diffusion-DPO's h: denoising on the winner, and a push away from the reference that fades as the pair is learned.

The form is that of the authors' code for SD1.5, repeated in SDPO's (arXiv 2511.03317). There one beta does both jobs,
and h is not detached. With the published 0.001 that leaves h about 0 and next to no push: DSPO is then SFT but for one
part in two thousand. So `logit_beta`, the strength inside h, can be chosen apart. (The SDXL branch of that code is
another, piecewise loss and is not here.)

Predictions of noise, of v and of the flow's velocity differ from the score by factors of t alone, which both terms
share: the same formula serves all three.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import NoiseSharing, random_noise, squared_error
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.objectives.diffusion_dpo import dpo_logit
from t2i_align.objectives.pairwise import preference_metrics, safeguard, scale_gradient
from t2i_align.utils.settings import Float, Positive, Share, settings


def dspo_loss(residual_w: Tensor, ref_residual_w: Tensor, h: Tensor, *, beta: float) -> Tensor:
    """Loss [B] from residuals [B, D], prediction minus target, and logits [B]."""
    push = (beta * torch.sigmoid(-h)).unsqueeze(-1)
    return squared_error(residual_w - push * (residual_w - ref_residual_w))


@settings
class DSPO(Objective):
    """DSPO on pairs.

    beta: of the push, below 1, so that it never outweighs the denoising. The authors search 0.001, 0.01 and 0.05.
    logit_beta: of h; null takes beta, as published. Diffusion-DPO's 2000 lets the push fade as pairs are learned.
    guard: SDPO's mu in [0, 1]; null switches it off. Its runs on SD1.5 use 0.2.
    """

    beta: Annotated[Float, Field(gt=0, lt=1, description="a number in (0, 1)")] = 0.001
    logit_beta: Positive | None = None
    noise: NoiseSharing = "shared"
    guard: Share | None = None

    name = "dspo"
    paper = "OpenReview xyfb9HHvMe"
    config = "sd15_dspo.yaml"
    needs = Requirements(candidates=2, ties=False, reference=True)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        noised = random_noise(batch, rng, self.noise)
        with torch.no_grad():
            ref_residuals = noised.residuals(reference)
        residuals = noised.residuals(policy)
        (residual_w, residual_l), ref_residual_w = (residuals[:, 0], residuals[:, -1]), ref_residuals[:, 0]
        err_w, err_l = squared_error(residual_w), squared_error(residual_l)
        ref_err_w, ref_err_l = squared_error(ref_residual_w), squared_error(ref_residuals[:, -1])
        if self.guard is not None:
            err_l = scale_gradient(err_l, safeguard(residual_w, residual_l, self.guard))
        logit_beta = self.beta if self.logit_beta is None else self.logit_beta
        h = dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=logit_beta)
        loss = dspo_loss(residual_w, ref_residual_w, h, beta=self.beta)
        return loss, preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta=logit_beta)
