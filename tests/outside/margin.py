"""A margin between the errors of a pair, without a reference: an objective in a file of its own."""

from __future__ import annotations

import torch.nn.functional as F
from margin_helper import scaled  # lies beside this file
from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives import Metrics, Objective, Requirements, register
from t2i_align.utils.settings import Positive, settings


def margin_loss(err_w: Tensor, err_l: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta (err_l - err_w)), [B], plus the winner's error."""
    return err_w - F.logsigmoid(scaled(err_l - err_w, beta))


@register
@settings
class Margin(Objective):
    """Denoising on the winner, and a margin to the loser. beta: of the margin."""

    beta: Positive = 10.0

    name = "margin"
    needs = Requirements(candidates=2, ties=False)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        err_w, err_l = random_noise(batch, rng).errors(policy)[:, [0, -1]].unbind(1)
        metrics = {"rewards/margins": (err_l - err_w).detach(), "error/chosen": err_w.detach()}
        return margin_loss(err_w, err_l, beta=self.beta), metrics
