"""Link functions: from the logit h of "winner beats loser" to a loss. One family, shared by every pairwise method.

With h positive where the policy agrees with the label and eps the assumed rate of flipped labels:

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

from t2i_align.errors import UserError, unknown
from t2i_align.utils.settings import Float, settings

LINKS = ("sigmoid", "robust", "hinge", "ipo")


@settings
class Link:
    """Fields that every pairwise objective offers. label_smoothing is eps above, in [0, 1/2)."""

    link: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5, description="a number in [0, 0.5)")] = 0.0

    def __post_init__(self) -> None:
        if self.label_smoothing and self.link in ("hinge", "ipo"):
            raise UserError(f"objective.label_smoothing has no meaning with link {self.link!r}; use sigmoid or robust")

    def loss(self, h: Tensor) -> Tensor:
        """Loss of each logit, same shape as h."""
        return link_loss(h, link=self.link, label_smoothing=self.label_smoothing)


def link_loss(h: Tensor, *, link: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each logit under a named link (see the module's table), same shape as h."""
    eps = label_smoothing
    if link == "sigmoid":
        return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)
    if link == "robust":
        return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)
    if link == "hinge":
        return (1 - h).clamp_min(0)
    if link == "ipo":
        return (h - 0.5).square()
    raise unknown("link", link, LINKS)
