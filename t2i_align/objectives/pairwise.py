"""Safeguards and metrics that the methods on pairs share.

guard         SDPO (arXiv 2511.03317): where the loser's output gradient points along the winner's, only
              lambda = min(1, (1 - mu) |g_w|^2 / <g_l, g_w>) of it passes, for each pair on its own
time_weight   lambda(t) = 1 + z / (1 + z) with z = 1 / sqrt(SNR(t)) (arXiv 2505.18736 weighs by
              1 + norm(z) and leaves norm open; this one is bounded also where the SNR is 0)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2i_align.diffusion.randomness import SampleRNG

TIME_BUCKETS = 4


def time_weight(rng: SampleRNG, timesteps: Tensor) -> Tensor:
    """1 + z / (1 + z) with z = sigma / alpha, in [1, 2]: more at high noise. timesteps [B]."""
    alpha, sigma = rng.process.alpha_sigma(timesteps)
    return (1 + sigma / (alpha + sigma)).to(torch.float32)


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


def wins(differences: Tensor) -> Tensor:
    """1 where positive, 1/2 where 0 (a tie), else 0; float32."""
    return (differences > 0).float() + 0.5 * (differences == 0).float()


def preference_metrics(
    err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float | Tensor
) -> dict[str, Tensor]:
    """What is watched in a pairwise run, [B] each; both error differences rising together is the main failure."""
    chosen = -0.5 * beta * (err_w - ref_err_w)
    rejected = -0.5 * beta * (err_l - ref_err_l)
    margins = chosen - rejected
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": wins(margins),
        "rewards/negative_margins": (margins < 0).float(),
        "error/chosen": err_w,
        "error/rejected": err_l,
        "error/chosen_minus_reference": err_w - ref_err_w,
        "error/rejected_minus_reference": err_l - ref_err_l,
    }
    return {name: value.detach() for name, value in metrics.items()}


def by_time(name: str, values: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """The metric split by quarter of the schedule (timesteps run to 1000 in every family), NaN outside its own."""
    bucket = (timesteps * TIME_BUCKETS / 1000).long().clamp_max(TIME_BUCKETS - 1)
    nothing = torch.full_like(values, math.nan)
    width = 1000 // TIME_BUCKETS
    return {
        f"{name}/t{i * width}-{(i + 1) * width}": torch.where(bucket == i, values, nothing) for i in range(TIME_BUCKETS)
    }
