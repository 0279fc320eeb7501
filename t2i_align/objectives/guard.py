"""SDPO's guard: how much of the loser's gradient may pass, for each pair on its own (arXiv 2511.03317)."""

from __future__ import annotations

import torch
from torch import Tensor


def safeguard(residual_w: Tensor, residual_l: Tensor, mu: float) -> Tensor:
    """Share of the loser's gradient that passes, [B] in [0, 1] (SDPO, arXiv 2511.03317); residuals [B, D].

    Residuals stand for the gradients of the squared errors in the output, to which they are proportional.
    """
    residual_w, residual_l = residual_w.detach(), residual_l.detach()
    along = (residual_l * residual_w).sum(-1)
    share = (1 - mu) * residual_w.square().sum(-1) / along
    return torch.where(along > 0, share.clamp(0, 1), torch.ones_like(along))


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """`value` unchanged, with its gradient multiplied by `factor`."""
    return value.detach() + factor * (value - value.detach())
