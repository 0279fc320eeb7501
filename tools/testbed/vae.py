"""Train a base's autoencoder on drawn images or clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pipelines
from t2i_align.testbed.scenes import SIDE
from tools.testbed.base import Base, to_pixels
from tools.testbed.loop import LoopConfig, fit, mixed


def render_samples(base: Base) -> tuple[np.ndarray, np.ndarray]:
    """Samples [N, F, 64, 64, 3] uint8 with faults, and the place [N, 2] (x, y in pixels) that crops should show."""
    recipe, rng = base.recipe.vae, np.random.default_rng((base.recipe.seed, 5))
    samples, centres = [], []
    for _ in range(recipe.number):
        drawn = base.draw(rng, recipe.faulty)
        samples.append(base.render(drawn, rng, recipe.faulty, recipe.degraded))
        centres.append(base.centre(drawn, rng))
    return np.stack(samples), np.array(centres).astype(np.int64)


def draw_crops(
    samples: np.ndarray, centres: np.ndarray, rng: np.random.Generator, batch: int, frames: int, side: int
) -> Tensor:
    """A batch of the samples' first frames, cropped to squares around `centres`.

    Most of a scene is flat background; crops hold about three times as many edges for the same work.
    """
    crops = np.empty((batch, frames, side, side, 3), np.uint8)
    for b, i in enumerate(rng.integers(len(samples), size=batch)):
        x, y = np.clip(centres[i] + rng.integers(-10, 11, 2) - side // 2, 0, SIDE - side)
        crops[b] = samples[i, :frames, y : y + side, x : x + side]
    return to_pixels(crops)


def vae_losses(base: Base, vae: Any, pixels: Tensor, progress: float, kl_weight: float) -> dict[str, Tensor]:
    """The base's reconstruction losses, and a tiny KL that only keeps the latents near unit scale."""
    with mixed(base.bf16):
        posterior = vae.encode(pixels).latent_dist
        decoded = base.decode(vae, posterior.sample())
    terms = base.reconstruction(decoded.float() - pixels, pixels, progress)
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1.0 - posterior.logvar.float()).mean()
    return {**terms, "kl": kl_weight * kl}


def train_vae(base: Base, state_file: Path) -> Any:
    """Train and finish the autoencoder, continuing from `state_file`; returns the exponential average.

    A step's data depend on (seed, step) only.
    """
    recipe, seed = base.recipe.vae, base.recipe.seed
    torch.manual_seed(seed)
    vae = base.build_vae()
    samples, centres = render_samples(base)
    *starts, steps = np.cumsum([0, *(phase[0] for phase in recipe.phases)]).tolist()
    step_losses = torch.compile(vae_losses) if recipe.compile else vae_losses

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, 3, step))
        _, batch, frames, side = recipe.phases[int(np.searchsorted(starts, step, side="right")) - 1]
        pixels = draw_crops(samples, centres, rng, batch, frames, side)
        torch.manual_seed(int(rng.integers(2**31)))  # of the posterior's sample
        return step_losses(base, vae, pixels, step / steps, recipe.kl_weight)

    def report(average: Any, step: int) -> None:
        pixels = torch.from_numpy(samples[:24]).movedim(-1, -3) / 255
        errors = (round_trip(base, average, samples[:24]).view_as(pixels) - pixels).square().flatten(1).mean(1)
        print(f"vae step {step}: {-10 * errors.clamp_min(1e-8).log10().mean():.2f} dB", flush=True)  # mean PSNR

    loop = LoopConfig(steps=steps, lr=recipe.lr, ema=0.998, every=400, muon=recipe.muon)
    average = fit(vae, losses, loop, state_file, report)
    base.finish(average, samples[:400])
    return average


def family_of(base: Base, vae: Any) -> Any:
    """The model family around the autoencoder, which encodes and decodes as training and sampling do."""
    return pipelines.wrap(base.assemble(vae, base.build_text_encoder(), base.build_denoiser()))


def encode(base: Base, vae: Any, samples: np.ndarray) -> Tensor:
    """Latents [N, ...] as the denoiser sees them, of uint8 samples [N, F, 64, 64, 3]."""
    family = family_of(base, vae)
    pixels = torch.from_numpy(samples).movedim(-1, -3).float() / 255
    with mixed(base.bf16):
        parts = (pixels if family.video else pixels[:, 0]).split(64)
        return torch.cat([family.encode_pixels(part).float() for part in parts])


def round_trip(base: Base, vae: Any, samples: np.ndarray) -> Tensor:
    """Decoded latents of uint8 samples [N, F, 64, 64, 3], in [0, 1]: images [N, 3, H, W] or clips [N, F, 3, H, W]."""
    pixels: Tensor = family_of(base, vae).decode_latents(encode(base, vae, samples))
    return pixels


@torch.no_grad()
def spread_to(vae: Any, means: Tensor, variance: Tensor, spread: Tensor, rotation: Tensor | None = None) -> None:
    """Fold z' = R diag(spread / std) V^T z - m into the 1 x 1 convolutions around the latents; decoding is unchanged.

    Args:
        means: samples of the posterior's mean [N, C]; V are their principal components, strongest first.
        variance: the posterior's variance [C], which becomes a constant.
        spread: standard deviations [C] of the components afterwards.
        rotation: R [C, C], applied last; none by default.
    """
    channels = means.shape[1]
    values, vectors = torch.linalg.eigh(torch.cov(means.T))
    order = values.argsort(descending=True)
    transform = torch.diag(spread / values[order].sqrt()) @ vectors[:, order].T
    transform = transform if rotation is None else rotation @ transform
    shift = transform @ means.mean(0)
    before, after = vae.quant_conv, vae.post_quant_conv
    weight, bias = before.weight[:channels].flatten(1).double(), before.bias[:channels].double()
    before.weight[:channels] = (transform @ weight).float().view_as(before.weight[:channels])
    before.bias[:channels] = (transform @ bias - shift).float()
    before.weight[channels:], before.bias[channels:] = 0.0, (transform.square() @ variance).log().float()
    inverse = after.weight.flatten(1).double() @ transform.inverse()
    after.weight[:] = inverse.float().view_as(after.weight)
    after.bias[:] = (after.bias.double() + inverse @ shift).float()


@torch.no_grad()
def posterior_statistics(vae: Any, samples: np.ndarray, batch: int = 20) -> tuple[Tensor, Tensor]:
    """Means [N, C] at every place of the samples' latents, and the mean variance [C], in float64."""
    parts = np.array_split(samples, -(-len(samples) // batch))
    posteriors = [vae.encode(to_pixels(part)).latent_dist for part in parts]
    means = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1).double()
    variances = torch.cat([p.var for p in posteriors]).transpose(0, 1).flatten(1).double()
    return means.T, variances.mean(1)
