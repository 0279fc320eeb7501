"""NCP-DPO: Diffusion-DPO with errors seen by the base denoiser's own features (arXiv 2406.17636).

    err = mean over features of [ f(x_hat_s, s, c) - f(x_s, s, c) ]^2,    h and loss as in Diffusion-DPO

f is the base denoiser up to its middle block, text included: "noise-conditioned perception". x_hat_s is one step from
x_t with the model's prediction, x_s the same step with the truth. Two ways to step, both from the released code:

    posterior   s = t - 1: q(x_s | x_t, x_hat), with one and the same noise for policy, reference and truth
    uniform     s drawn anew: x_s = alpha_s x_hat + sigma_s noise_hat, without noise

The posterior is written for any alpha, sigma (arXiv 2107.00630, eq. 25-26): for variance-preserving processes it is
DDPM's, for rectified flow it is our reading, as the paper has no flow (uniform is an Euler step there). At t = 0 it
stays where it is, as released, and teaches nothing. The two points are some thousandths apart, so that in bfloat16 the
error is mostly rounding (a hundred times the true one on the testbed): train in float32, or use uniform.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from t2i_align.data.batch import Batch, Conditioning, Model
from t2i_align.diffusion.noising import Noised, normal_noise, per_row, random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Requirements
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.utils.settings import Positive, settings

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import ForwardProcess


class Perceiving(Protocol):
    """A reference that also gives features, differentiable in the noisy latents."""

    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor: ...

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor: ...


def posterior_step(
    process: ForwardProcess, clean: Tensor, noisy_latents: Tensor, timesteps: Tensor, earlier: Tensor, noise: Tensor
) -> Tensor:
    """A sample of q(x_s | x_t, x) from standard normal noise, with s = `earlier` <= t = `timesteps`, [B] each."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(timesteps), process.alpha_sigma(earlier)
    kept = alpha_t / alpha_s
    share = ((sigma_s / sigma_t) ** 2).nan_to_num()  # sigma_t = 0 is the flow's t = 0: nothing moves there
    added = 1 - kept**2 * share  # of sigma_t^2, what came between s and t
    coefficients = alpha_s * added, kept * share, sigma_s * added.clamp_min(0).sqrt()
    of_clean, of_noisy, of_noise = (per_row(value, clean).to(clean.dtype) for value in coefficients)
    return of_clean * clean + of_noisy * noisy_latents + of_noise * noise


@dataclass(frozen=True, kw_only=True)
class Perceived(Noised):
    """Candidates whose residuals are differences of features at `earlier`; `target` are the truth's features."""

    process: ForwardProcess
    earlier: Tensor
    noise: Tensor | None  # of the posterior; None steps without
    perceive: Model

    def step(self, prediction: Tensor) -> Tensor:
        """x_s as a native prediction has it, [B * k, ...]."""
        if self.noise is None:
            return self.process.step(prediction, self.latents, self.timesteps, self.earlier)
        clean = self.process.to_clean(prediction, self.latents, self.timesteps)
        return posterior_step(self.process, clean, self.latents, self.timesteps, self.earlier, self.noise)

    def residuals(self, model: Model) -> Tensor:
        prediction = model(self.latents, self.timesteps, self.conditioning)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        features = self.perceive(self.step(prediction), self.earlier, self.conditioning)
        dtype = torch.promote_types(features.dtype, torch.float32)
        return (features.to(dtype) - self.target.to(dtype)).flatten(1).unflatten(0, (self.groups, -1))


@settings
class NCPDPO(DiffusionDPO):
    """NCP-DPO on pairs. beta: the paper's 2500 has no factor 1/2: it is 5000 here. renoise: how to step."""

    beta: Positive = 5000.0
    renoise: Literal["posterior", "uniform"] = "posterior"

    name = "ncp_dpo"
    paper = "arXiv 2406.17636"
    config = "sd15_ncp_dpo.yaml"
    needs = Requirements(candidates=2, ties=False, reference=True, features=True)

    def noised(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> Noised:
        noised = random_noise(batch, rng, self.noise)
        if self.renoise == "uniform":
            earlier = rng.process.timesteps(rng.uniform("renoise")).repeat_interleave(batch.latents.shape[1])
            noise = None
        else:
            earlier = (noised.timesteps - 1).clamp_min(0)
            noise = normal_noise(batch, rng, "posterior", self.noise)
        perceive = cast(Perceiving, reference).features
        perceived = Perceived(**vars(noised), process=rng.process, earlier=earlier, noise=noise, perceive=perceive)
        with torch.no_grad():
            truth = perceive(perceived.step(noised.target), earlier, noised.conditioning)
        return replace(perceived, target=truth)
