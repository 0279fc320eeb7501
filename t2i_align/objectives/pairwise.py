"""What every method on pairs shares: errors of both candidates against a reference, one logit, one link.

    h = -1/2 beta w [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    loss = link(h)

A method says how candidates become noisy (`noised`), under which captions (`paired`) and how strongly a pair counts
(`strength`, the w above). Two safeguards can be added to any of them:

    guard         SDPO (arXiv 2511.03317): where the loser's output gradient points along the winner's, only
                  lambda = min(1, (1 - mu) |g_w|^2 / <g_l, g_w>) of it passes, for each pair on its own
    time_weight   lambda(t) = 1 + z / (1 + z) with z = 1 / sqrt(SNR(t)) (arXiv 2505.18736 weighs by
                  1 + norm(z) and leaves norm open; this one is bounded also where the SNR is 0)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from t2i_align.data.schema import Batch, Model
from t2i_align.diffusion.noising import Noised, random_noise, squared_error
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.objectives.guard import safeguard, scale_gradient
from t2i_align.objectives.links import Link
from t2i_align.objectives.monitoring import by_time, preference_metrics
from t2i_align.utils.settings import Float, Positive, Share, settings

BETA_RATE = 0.5  # how fast log(beta) follows the gradient factor's distance from its target, per optimiser step


def dpo_logit(err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float | Tensor) -> Tensor:
    """h of Diffusion-DPO (arXiv 2311.12908, eq. 14), [B]; positive where the policy prefers the winner more than the
    reference does."""
    return -0.5 * beta * ((err_w - ref_err_w) - (err_l - ref_err_l))


def time_weight(draw: SampleRNG, timesteps: Tensor) -> Tensor:
    """1 + z / (1 + z) with z = sigma / alpha, in [1, 2]: more at high noise. timesteps [B]."""
    alpha, sigma = draw.process.alpha_sigma(timesteps)
    return (1 + sigma / (alpha + sigma)).to(torch.float32)


@settings
class Pairwise(Link, Objective):
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

    def step(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> tuple[Tensor, Metrics]:
        batch = self.paired(batch)
        noised = self.noised(policy, reference, batch, draw)
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
            beta = beta * time_weight(draw, timesteps)
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

    def noised(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> Noised:
        """How candidates become noisy latents with a target."""
        return random_noise(batch, draw, self.noise)

    def strength(self, batch: Batch) -> float | Tensor:
        """How strongly each pair counts inside the logit, [B] or one number."""
        return 1.0

    def logit(self, err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, beta: float | Tensor) -> Tensor:
        """h, [B]."""
        return dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta)

    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of each pair, [B], and metrics of its own."""
        return self.loss(h), {}

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
