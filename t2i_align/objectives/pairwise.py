"""What every method on pairs shares: errors of both candidates against a reference, one logit, one loss.

    h = logit(err_w, err_l, ref_err_w, ref_err_l; beta w),    loss = pair_loss(h)

A method says how candidates become noisy (`noised`), under which captions (`paired`) and how strongly a pair counts
(`strength`, the w above). Two safeguards can be added to any of them:

    guard         SDPO (arXiv 2511.03317): where the loser's output gradient points along the winner's, only
                  lambda = min(1, (1 - mu) |g_w|^2 / <g_l, g_w>) of it passes, for each pair on its own
    time_weight   lambda(t) = 1 + z / (1 + z) with z = 1 / sqrt(SNR(t)) (arXiv 2505.18736 weighs by
                  1 + norm(z) and leaves norm open; this one is bounded also where the SNR is 0)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.data.schema import Batch, Model
from t2i_align.diffusion.noising import Noised, random_noise, squared_error
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.utils.settings import Float, Positive, Share, settings

BETA_RATE = 0.5  # how fast log(beta) follows the gradient factor's distance from its target, per optimiser step
TIME_BUCKETS = 4


@settings
class Pairwise(Objective):
    """Fields of every method on pairs.

    beta: strength of the pull to the reference, with mean errors.
    reduction: `mean` over the latent's elements, as all released code; `sum` is the likelihood's own scale, where
        beta means the same at every resolution.
    noise: `shared` within a pair, as released, or `independent`.
    guard: SDPO's mu in [0, 1]; null switches it off. time_weight: `none`, or `snr` (see the module).
    target_gradient: beta is adapted so that the mean gradient factor sigmoid(-h) comes to this; null keeps beta.
        1/2 is no preference learned, 0 is all learned; around 0.4 is a gentle run.
    """

    beta: Positive = 2000.0
    reduction: Literal["mean", "sum"] = "mean"
    noise: Literal["shared", "independent"] = "shared"
    guard: Share | None = None
    time_weight: Literal["none", "snr"] = "none"
    target_gradient: Annotated[Float, Field(gt=0, lt=0.5, description="a number in (0, 0.5)")] | None = None

    needs = Requirements(candidates=2, ties=False, reference=True)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        batch = self.paired(batch)
        noised = self.noised(policy, reference, batch, rng)
        with torch.no_grad():  # first: its memory is free again before the policy's activations take theirs
            ref_residuals = noised.residuals(reference)
            ref_err_w, ref_err_l = squared_error(ref_residuals, self.reduction)[:, [0, -1]].unbind(1)
        residuals = noised.residuals(policy)
        err_w, err_l = squared_error(residuals, self.reduction)[:, [0, -1]].unbind(1)
        if self.guard is not None:
            passing = safeguard(residuals[:, 0], residuals[:, -1], self.guard)
            err_l = scale_gradient(err_l, passing)
        timesteps = noised.timesteps.view(len(err_w), -1)[:, 0]
        beta = self._beta(batch) * self.strength(batch)
        if self.time_weight == "snr":
            beta = beta * time_weight(rng, timesteps)
        h = self.logit(err_w, err_l, ref_err_w, ref_err_l, beta)
        metrics = preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
        metrics |= by_time("rewards/margins", metrics["rewards/margins"], timesteps)
        metrics["drift"] = (residuals.detach() - ref_residuals).square().mean((1, 2))
        metrics["rewards/gradient_factor"] = torch.sigmoid(-h.detach())
        if self.guard is not None:
            metrics["guard/passing"] = passing
        if self.target_gradient is not None:
            metrics["beta"] = torch.ones_like(err_l.detach()) * self._beta(batch)
        loss, more = self.pair_loss(h, batch)
        return loss, metrics | more

    # What a method changes -------------------------------------------------------------------------------------------

    def paired(self, batch: Batch) -> Batch:
        """The winner and the loser with the captions they are denoised under: here the prompt for both."""
        return batch

    def noised(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> Noised:
        """How candidates become noisy latents with a target."""
        return random_noise(batch, rng, self.noise)

    def strength(self, batch: Batch) -> float | Tensor:
        """How strongly each pair counts inside the logit, [B] or one number."""
        return 1.0

    @abstractmethod
    def logit(self, err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, beta: float | Tensor) -> Tensor:
        """h, [B]; positive where the policy agrees with the label."""

    @abstractmethod
    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of each pair, [B], and metrics of its own."""

    # Automatic beta --------------------------------------------------------------------------------------------------

    def initial_state(self) -> dict[str, float]:
        return {} if self.target_gradient is None else {"beta": self.beta}

    def update_state(self, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.target_gradient is None:
            return dict(state)
        # A factor above the target says that preferences are learned too weakly: a larger beta sharpens them.
        excess = means["rewards/gradient_factor"] - self.target_gradient
        return {**state, "beta": state["beta"] * torch.exp(BETA_RATE * excess)}

    def _beta(self, batch: Batch) -> float | Tensor:
        return self.beta if self.target_gradient is None else batch.state["beta"]


# Safeguards -----------------------------------------------------------------------------------------------------------


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


# Metrics --------------------------------------------------------------------------------------------------------------


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
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "rewards/negative_margins": (margins < 0).float(),
        "error/chosen": err_w,
        "error/rejected": err_l,
        "error/chosen_minus_reference": err_w - ref_err_w,
        "error/rejected_minus_reference": err_l - ref_err_l,
    }
    return {name: value.detach() for name, value in metrics.items()}


def by_time(name: str, values: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
    """The metric split by quarter of the schedule (timesteps run to 1000 in every family), NaN outside its own."""
    bucket = (timesteps * TIME_BUCKETS / 1000).long().clamp(0, TIME_BUCKETS - 1)
    nothing = torch.full_like(values, math.nan)
    width = 1000 // TIME_BUCKETS
    return {
        f"{name}/t{i * width}-{(i + 1) * width}": torch.where(bucket == i, values, nothing) for i in range(TIME_BUCKETS)
    }
