"""Diffusion-DPO: raise the winner's likelihood over the loser's, measured against a reference (arXiv 2311.12908).

    h = -1/2 beta [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    loss = link(h)                  (eq. 14)

T and the weight omega(lambda_t) are folded into beta, as in the paper. The error is the native target's: noise for
epsilon-, v for v-prediction and flow matching (Flow-DPO, arXiv 2501.13918, which reports that the derived weight
(1 - t)^2 is worse than none).

With h positive where the policy agrees with the label and eps the assumed rate of flipped labels, the links are

    sigmoid   -(1 - eps) log s(h) - eps log s(-h)                        cDPO; eps = 0 is DPO (arXiv 2305.18290, eq. 7)
    robust    [-(1 - eps) log s(h) + eps log s(-h)] / (1 - 2 eps)        rDPO (arXiv 2403.00409, eq. 12): unbiased
    hinge     max(0, 1 - h)                                              SLiC (arXiv 2305.10425), RSO (2309.06657)
    ipo       (h - 1/2)^2                                                IPO (arXiv 2310.12036, eq. 17) times tau^2

`robust` has a gradient that never vanishes and no lower bound: stop early, or clip. IPO is written on the scaled
margin h = tau * margin, because with mean-squared errors the margin is about 1e-4 and the unscaled loss would leave
gradients below Adam's eps.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.data.schema import Batch
from t2i_align.errors import UserError
from t2i_align.objectives.base import Metrics
from t2i_align.objectives.pairwise import Pairwise
from t2i_align.utils.settings import Float, settings

Link = Literal["sigmoid", "robust", "hinge", "ipo"]


def dpo_logit(err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float | Tensor) -> Tensor:
    """h (arXiv 2311.12908, eq. 14), [B]; positive where the policy prefers the winner more than the reference does."""
    return -0.5 * beta * ((err_w - ref_err_w) - (err_l - ref_err_l))


def link_loss(h: Tensor, *, link: Link = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each logit under a named link (see the module's table), same shape as h."""
    eps = label_smoothing
    if link == "sigmoid":
        return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)
    if link == "robust":
        return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)
    return (1 - h).clamp_min(0) if link == "hinge" else (h - 0.5).square()


@settings
class DiffusionDPO(Pairwise):
    """Diffusion-DPO on pairs.

    beta: the paper uses 2000 (SD1.5) and 5000 (SDXL) with mean errors. diffusers' script has no factor 1/2: its
        2500 is 5000 here.
    link: `sigmoid`, `robust`, `hinge` or `ipo`. label_smoothing: eps, in [0, 1/2).
    """

    link: Link = "sigmoid"
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5, description="a number in [0, 0.5)")] = 0.0

    name = "diffusion_dpo"
    paper = "arXiv 2311.12908"
    config = "sd15_diffusion_dpo.yaml"

    def __post_init__(self) -> None:
        if self.label_smoothing and self.link in ("hinge", "ipo"):
            raise UserError(f"objective.label_smoothing has no meaning with link {self.link!r}; use sigmoid or robust")

    def logit(self, err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, beta: float | Tensor) -> Tensor:
        return dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta)

    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        return link_loss(h, link=self.link, label_smoothing=self.label_smoothing), {}
