"""The forward process: how clean latents become noise, and every conversion that follows from it.

One module owns prediction types and time. Everywhere in the project x_t = alpha_t x + sigma_t noise, with
sigma growing with t: t = 0 is the clean image, the largest t is noise.

    variance preserving   alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)    target: noise, or
                                                                                v = alpha_t noise - sigma_t x
    rectified flow        alpha_t = 1 - sigma_t,  sigma_t = t / 1000            target: v = noise - x

Sources: DDPM (arXiv 2006.11239), v-prediction (2202.00512, appendix D), DDIM (2010.02502, eq. 12),
rectified flow (2209.03003). Coefficients are computed in float64 and applied in float32 or better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]
TIMESTEP_SAMPLING = ("uniform", "logit_normal", "geometric")
# arXiv 2505.18736 draws t from Categorical(0.9^k) with k counted from the noisy end. Over 1000 timesteps that would be
# some 10 of them; the dense-reward code it cites has 0.9^0 … 0.9^49 for the 50 steps of a sampler: hence 50 bins.
GEOMETRIC_DECAY, GEOMETRIC_BINS = 0.9, 50


class ForwardProcess(ABC):
    """alpha, sigma and prediction type; `timesteps` are what the denoiser is given, [B]."""

    prediction_type: PredictionType

    @abstractmethod
    def timesteps(self, u: Tensor, sampling: str = "uniform") -> Tensor:
        """Quantiles u in [0, 1), [B], to timesteps, [B], under a named distribution of training times."""

    @abstractmethod
    def sampling_times(self, steps: int) -> Tensor:
        """The timesteps of a sampler of so many steps, [steps], from noise on; evenly spaced, the last above 0."""

    @abstractmethod
    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients at `timesteps`, float64 where the device has it, [B] each."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t noise. latents, noise: [B, ...]; timesteps: [B]."""
        alpha, sigma = self._coefficients(timesteps, latents)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict at x_t, [B, ...]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "flow":
            return noise - latents
        alpha, sigma = self._coefficients(timesteps, latents)
        return alpha * noise - sigma * latents

    def to_clean(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction implies. With epsilon-prediction, infinite where alpha is 0."""
        alpha, sigma = self._coefficients(timesteps, noisy_latents)
        if self.prediction_type == "epsilon":
            return (noisy_latents - sigma * model_pred) / alpha
        if self.prediction_type == "flow":
            return noisy_latents - sigma * model_pred
        return alpha * noisy_latents - sigma * model_pred

    def to_noise(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction implies, [B, ...]."""
        alpha, sigma = self._coefficients(timesteps, noisy_latents)
        if self.prediction_type == "epsilon":
            return model_pred
        if self.prediction_type == "flow":
            return noisy_latents + alpha * model_pred
        return sigma * noisy_latents + alpha * model_pred

    def step(self, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor, to_timesteps: Tensor) -> Tensor:
        """One deterministic step from `timesteps` to `to_timesteps` ([B] each), in either direction.

        x_s = alpha_s x_hat + sigma_s noise_hat: DDIM with eta = 0 for variance-preserving processes, and exactly
        one Euler step x_s = x_t + (sigma_s - sigma_t) v for rectified flow.
        """
        clean = self.to_clean(model_pred, noisy_latents, timesteps)
        noise = self.to_noise(model_pred, noisy_latents, timesteps)
        return self.add_noise(clean, noise, to_timesteps)

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(timesteps)
        shape = (-1, *([1] * (like.ndim - 1)))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return alpha.to(dtype).view(shape), sigma.to(dtype).view(shape)


class VariancePreserving(ForwardProcess):
    """The discrete process of SD1.x, SD2.x and SDXL: integer timesteps 0 … T - 1 into a table of abar.

    Args:
        alphas_cumprod: [T], as the checkpoint's own scheduler holds it.
        prediction_type: "epsilon" or "v_prediction", as the checkpoint's own scheduler says.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type must be 'epsilon' or 'v_prediction', found {prediction_type!r}")
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        self._tables: dict[torch.device, Tensor] = {}
        self.prediction_type = prediction_type

    def timesteps(self, u: Tensor, sampling: str = "uniform") -> Tensor:
        count = len(self.alphas_cumprod)
        return (_quantile(u, sampling) * count).long().clamp_(0, count - 1)

    def sampling_times(self, steps: int) -> Tensor:
        count = len(self.alphas_cumprod)  # diffusers' "trailing" spacing
        return (count - count / steps * torch.arange(steps, dtype=torch.float64)).round().long() - 1

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        device = timesteps.device
        if device not in self._tables:
            self._tables[device] = _precise(self.alphas_cumprod, device)
        abar = self._tables[device][timesteps.long()]
        return abar.sqrt(), (1 - abar).sqrt()


class RectifiedFlow(ForwardProcess):
    """The straight path of SD3, FLUX, Wan and LTX: timesteps are 1000 sigma, floats in [0, 1000].

    Args:
        shift: the resolution-dependent shift s of SD3 (arXiv 2403.03206, eq. 23), applied to the sampled training
            times: sigma -> s sigma / (1 + (s - 1) sigma).
        span: the sigmas that a denoiser serves, for models with one for each part of the way: the shifted times are
            squeezed into it.
    """

    prediction_type: PredictionType = "flow"

    def __init__(self, shift: float = 1.0, span: tuple[float, float] = (0.0, 1.0)) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, found {shift}")
        self.shift, self.span = shift, span

    def timesteps(self, u: Tensor, sampling: str = "uniform") -> Tensor:
        sigma = _quantile(u, sampling)
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        low, high = self.span
        return 1000 * (low + (high - low) * sigma)

    def sampling_times(self, steps: int) -> Tensor:
        return self.timesteps(1 - torch.arange(steps, dtype=torch.float64) / steps)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        sigma = _precise(timesteps, timesteps.device) / 1000
        return 1 - sigma, sigma


def process_of(scheduler: Any, *, flow: bool, span: tuple[float, float] = (0.0, 1.0)) -> ForwardProcess:
    """The forward process whose noise a scheduler removes, for a family of rectified flow or a variance-preserving one.

    Raises:
        ValueError: a scheduler of another kind, such as EDM's, continuous sigmas, or a prediction of the image itself.
    """
    config, name = scheduler.config, type(scheduler).__name__
    prediction, flow_sigmas = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    if flow:
        matching = name.startswith(("FlowMatch", "LTXEulerAncestralRF")) and not config.get("invert_sigmas")
        if not matching and not (flow_sigmas and prediction == "flow_prediction"):
            raise ValueError(f"expected a scheduler of flow matching, found {name} (prediction_type {prediction!r})")
        if config.num_train_timesteps != 1000:
            raise ValueError(f"expected times of 0 to 1000, found {name} with {config.num_train_timesteps}")
        return RectifiedFlow(scheduler_shift(config), span)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or flow_sigmas or config.get("timestep_type", "discrete") != "discrete":
        kind = "continuous sigmas" if table is not None and not flow_sigmas else f"prediction_type {prediction!r}"
        raise ValueError(f"expected a scheduler with a table of noise levels (as DDIMScheduler), found {name} ({kind})")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"expected the prediction type epsilon or v_prediction, found {name} with {prediction!r}")
    return VariancePreserving(table, prediction)


def scheduler_shift(config: Mapping[str, Any]) -> float:
    """The shift of training times that a flow scheduler's configuration asks for.

    1 where its sampler shifts by resolution: the trainers of these models then train unshifted.
    """
    if config.get("use_dynamic_shifting"):
        return 1.0
    return float(config.get("shift") or config.get("flow_shift") or 1.0)


def resolution_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The shift by which a sampler with dynamic shifting treats samples of so many tokens: e^mu, mu linear in tokens.

    Under `time_shift_type: linear` it is mu itself.
    FLUX's rule; the line goes through `base_shift` at `base_image_seq_len` and `max_shift` at `max_image_seq_len`.
    """
    short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - short) / (long - short)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _precise(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device` in float64, or in float32 on Apple's GPUs, which have no float64."""
    return values.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _quantile(u: Tensor, sampling: str) -> Tensor:
    """The inverse distribution function of a named distribution of times in [0, 1)."""
    if sampling == "uniform":
        return u
    if sampling == "logit_normal":  # SD3, arXiv 2403.03206, eq. 19 with m = 0, s = 1
        return torch.special.ndtri(_precise(u, u.device).clamp(1e-7, 1 - 1e-7)).sigmoid().to(u.dtype)
    if sampling == "geometric":
        return _geometric_quantile(_precise(u, u.device)).to(u.dtype)
    raise ValueError(f"unknown timestep sampling {sampling!r}. Choices: {', '.join(TIMESTEP_SAMPLING)}.")


def _geometric_quantile(u: Tensor) -> Tensor:
    """Bins of equal width with probability proportional to decay^k, k = 0 the noisiest; uniform within a bin.

    The share of the k noisiest bins is F(k) = (1 - decay^k) / (1 - decay^bins). Growing u means growing time.
    """
    mass = 1 - GEOMETRIC_DECAY**GEOMETRIC_BINS
    above = 1 - u  # the share of times beyond the one sought
    k = (torch.log1p(-mass * above) / math.log(GEOMETRIC_DECAY)).floor().clamp_max(GEOMETRIC_BINS - 1)
    share, bin_share = (1 - GEOMETRIC_DECAY**k) / mass, GEOMETRIC_DECAY**k * (1 - GEOMETRIC_DECAY) / mass
    times = 1 - (k + (above - share) / bin_share) / GEOMETRIC_BINS
    return times.clamp(0, 1 - 2**-24)  # single precision's nearest to 1: rounding must not leave [0, 1)
