"""LCPO: how far a label is trusted follows from the policy's own belief (arXiv 2509.24159), on Diffusion-DPO's logit.

    w = eta p / (eta p + (1 - eta) (1 - p)),    p = sigmoid(h), both without gradient
    loss = -[ w log sigmoid(h) + (1 - w) log sigmoid(-h) ],    eta <- running mean of w

eta is the assumed share of right labels; the paper keeps one for each annotator, this one serves the whole data. At the
start p = 1/2, so w = eta: eta = 1/2 would give no signal at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.data.batch import Batch
from t2i_align.objectives.base import Metrics
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.utils.settings import Float, Share, settings

ETA_MAX = 0.999  # eta = 1 would trust every label permanently


def trust(h: Tensor, eta: Tensor | float) -> Tensor:
    """w, the posterior that a label is right, without gradient; shaped like h."""
    p = torch.sigmoid(h.detach())
    return eta * p / (eta * p + (1 - eta) * (1 - p))


def lcpo_loss(h: Tensor, w: Tensor) -> Tensor:
    """Loss of each logit, shaped like h, with w its label's `trust`."""
    return -(w * F.logsigmoid(h) + (1 - w) * F.logsigmoid(-h))


@settings
class LCPO(DiffusionDPO):
    """LCPO on pairs. eta: its first value, in (1/2, 1). rate: of its running mean, in [0, 1]; 0 keeps it.

    Both defaults are the paper's, which found rates of 0.001 and 1 worse.
    """

    eta: Annotated[Float, Field(gt=0.5, lt=1, description="a number in (0.5, 1)")] = 0.9
    rate: Share = 0.1

    name = "lcpo"
    paper = "arXiv 2509.24159"
    config = "sd15_lcpo.yaml"
    links = False

    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        w = trust(h, batch.state["eta"].to(h.dtype))
        return lcpo_loss(h, w), {"lcpo/trust": w}

    def initial_state(self) -> dict[str, float]:
        return {**super().initial_state(), "eta": self.eta}

    def update_state(self, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        eta = torch.lerp(state["eta"], means["lcpo/trust"].to(state["eta"].dtype), self.rate)
        return {**super().update_state(state, means), "eta": eta.clamp(0.5, ETA_MAX)}
