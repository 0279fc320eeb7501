"""DMPO: reverse-KL matching of the preference distribution, as implemented beside SDPO (arXiv 2511.03317).

    loss = KL( Bernoulli(sigmoid(h)) || Bernoulli(1 - alpha) ),    h as in Diffusion-DPO

It vanishes at h = log((1 - alpha) / alpha): unlike Diffusion-DPO it stops there instead of pushing on.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.data.batch import Batch
from t2i_align.objectives.base import Metrics
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.utils.settings import Float, settings


def dmpo_loss(h: Tensor, *, alpha: float) -> Tensor:
    """KL divergence of the policy's preference from the label's, softened by alpha; shaped like h."""
    p = torch.sigmoid(h)
    return p * (F.logsigmoid(h) - math.log1p(-alpha)) + (1 - p) * (F.logsigmoid(-h) - math.log(alpha))


@settings
class DMPO(DiffusionDPO):
    """DMPO on pairs; the released code uses alpha 0.01 and beta 2000."""

    alpha: Annotated[Float, Field(gt=0, lt=0.5, description="a number in (0, 0.5)")] = 0.01

    name = "dmpo"
    paper = "arXiv 2511.03317"
    config = "sd15_dmpo.yaml"
    links = False

    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return dmpo_loss(h, alpha=self.alpha), {}
