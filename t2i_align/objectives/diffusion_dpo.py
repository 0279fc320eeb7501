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

A method on pairs is a subclass that changes one thing: how candidates become noisy (`noised`), under which captions
(`paired`), how strongly a pair counts (`strength`, a factor of beta), the logit, or its loss (`pair_loss`). One whose
`needs` have no reference gets ref_err = 0, and keeps the links, the guard and the metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import (
    Noised,
    NoiseSharing,
    Reduction,
    keep_errors,
    random_noise,
    squared_error,
    stored_errors,
)
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.objectives.pairwise import by_time, preference_metrics, safeguard, scale_gradient, time_weight
from t2i_align.utils.settings import Float, Positive, Share, settings

Link = Literal["sigmoid", "robust", "hinge", "ipo"]
BETA_RATE = 0.5  # how fast log(beta) follows the gradient factor's distance from its target, per optimiser step


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
class DiffusionDPO(Objective):
    """Diffusion-DPO on pairs.

    beta: strength of the pull to the reference, with mean errors: the paper uses 2000 (SD1.5) and 5000 (SDXL).
        diffusers' script has no factor 1/2: its 2500 is 5000 here.
    reduction: `mean` over the latent's elements, as all released code; `sum` is the likelihood's own scale, where
        beta means the same at every resolution.
    noise: `shared` within a pair, as released, or `independent`.
    guard: SDPO's mu in [0, 1]; null switches it off. time_weight: `none`, or `snr` (see `pairwise`).
    target_gradient: beta is adapted so that the mean gradient factor sigmoid(-h) comes to this; null keeps beta.
        1/2 is no preference learned, 0 is all learned; around 0.4 is a gentle run.
    link: `sigmoid`, `robust`, `hinge` or `ipo`. label_smoothing: eps, in [0, 1/2).
    """

    beta: Positive = 2000.0
    reduction: Reduction = "mean"
    noise: NoiseSharing = "shared"
    guard: Share | None = None
    time_weight: Literal["none", "snr"] = "none"
    target_gradient: Annotated[Float, Field(gt=0, lt=0.5, description="a number in (0, 0.5)")] | None = None
    link: Link = "sigmoid"
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5, description="a number in [0, 0.5)")] = 0.0

    name = "diffusion_dpo"
    paper = "arXiv 2311.12908"
    config = "sd15_diffusion_dpo.yaml"
    needs = Requirements(candidates=2, ties=False, reference=True)
    links: ClassVar[bool] = True  # False for a loss of its own, to which link and label_smoothing mean nothing

    def __post_init__(self) -> None:
        if not self.links and (self.link != "sigmoid" or self.label_smoothing):
            raise UserError(
                f"objective.link and objective.label_smoothing have no meaning for {self.name}; leave them out"
            )
        if self.label_smoothing and self.link in ("hinge", "ipo"):
            raise UserError(f"objective.label_smoothing has no meaning with link {self.link!r}; use sigmoid or robust")

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        batch = self.paired(batch)
        noised = self.noised(policy, reference, batch, rng)
        against = None
        if self.needs.reference:
            with torch.no_grad():  # first: its memory is free again before the policy's activations take theirs
                against = stored_errors(reference)
                if against is None:
                    against = noised.residuals(reference)
                    keep_errors(reference, squared_error(against, self.reduction))
        timesteps = noised.timesteps.view(len(batch.keys), -1)[:, 0]
        return self.compared(noised.residuals(policy), against, timesteps, batch, rng)

    def compared(
        self,
        residuals: Tensor,
        against: Tensor | None,
        timesteps: Tensor,
        batch: Batch,
        rng: SampleRNG,
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics, [B] each, of the winners' and losers' residuals, [B, 2, D], at timesteps [B].

        against: the reference's residuals, or where these are stored its errors, [B, 2].
        """
        err = squared_error(residuals, self.reduction)
        ref_residuals = against if against is not None and against.ndim == 3 else None
        ref_err = torch.zeros_like(err) if against is None else against
        if ref_residuals is not None:
            ref_err = squared_error(ref_residuals, self.reduction)
        err_w, err_l, ref_err_w, ref_err_l = err[:, 0], err[:, -1], ref_err[:, 0], ref_err[:, -1]
        metrics: Metrics = {}
        if self.guard is not None:
            metrics["guard/passing"] = passing = safeguard(residuals[:, 0], residuals[:, -1], self.guard)
            err_l = scale_gradient(err_l, passing)
        beta = batch.state.get("beta", self.beta)
        if self.target_gradient is not None:
            metrics["beta"] = torch.ones_like(err_l.detach()) * beta
        beta = beta * self.strength(batch)
        if self.time_weight == "snr":
            beta = beta * time_weight(rng, timesteps)
        h = self.logit(err_w, err_l, ref_err_w, ref_err_l, beta)
        metrics |= preference_metrics(err_w, err_l, ref_err_w, ref_err_l, beta=beta)
        metrics |= by_time("rewards/margins", metrics["rewards/margins"], timesteps)
        if not self.needs.reference:
            metrics = {name: value for name, value in metrics.items() if not name.endswith("_minus_reference")}
        if ref_residuals is not None:
            metrics["drift"] = (residuals.detach() - ref_residuals).square().mean((1, 2))
        metrics["rewards/gradient_factor"] = torch.sigmoid(-h.detach())
        loss, more = self.pair_loss(h, batch)
        return loss, metrics | more

    def errors_key(self) -> str | None:
        cls, own = type(self), DiffusionDPO
        plain = (cls.step, cls.compared, cls.noised) == (own.step, own.compared, own.noised)
        if not (self.needs.reference and plain):
            return None
        texts = "captions" if "captions" in self.needs.columns else "prompt"
        pairs = "" if cls.paired == own.paired else f", paired by {cls.__qualname__}"
        return f"{self.reduction} over {self.noise} noise under the {texts}{pairs}"

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

    def logit(self, err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, beta: float | Tensor) -> Tensor:
        """h, [B]; positive where the policy agrees with the label."""
        return dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta)

    def pair_loss(self, h: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of each pair, [B], and metrics of its own."""
        return link_loss(h, link=self.link, label_smoothing=self.label_smoothing), {}

    # Automatic beta --------------------------------------------------------------------------------------------------

    def initial_state(self) -> dict[str, float]:
        return {} if self.target_gradient is None else {"beta": self.beta}

    def update_state(self, state: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.target_gradient is None:
            return dict(state)
        # A factor above the target says that preferences are learned too weakly: a larger beta sharpens them.
        excess = (means["rewards/gradient_factor"] - self.target_gradient).nan_to_num(0.0)  # NaN: ties alone (DenseDPO)
        return {**state, "beta": state["beta"] * torch.exp(BETA_RATE * excess)}
