"""Train the tiny causal autoencoder of the video base: an `AutoencoderKLWan` with Wan's own compression.

Nine frames of 64 x 64 become three of 8 x 8 with 16 channels: four frames (the first alone) and 8 x 8 pixels
each, as in Wan 2.1. As in Wan 2.2's autoencoder, 2 x 2 pixels are folded into channels first, which saves the
convolutions at full resolution, and shortcuts lead around the levels, which made it learn faster.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.nn import functional as F

from t2i_align.testbed.clips import FAULT_RATES, FRAMES, sample_clip, spoil, to_clip
from t2i_align.testbed.scenes import SIDE
from tools.testbed.loop import LoopConfig, fit
from tools.testbed.muon import Muon
from tools.testbed.vae import spread_to

CHANNELS = 16
EVENNESS = 0.4  # the power of its variance that a component keeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoVAEConfig:
    """Recipe of the shipped autoencoder: (steps, clips a step, frames, side of the crops) of each phase."""

    phases: tuple[tuple[int, int, int, int], ...] = ((1000, 10, 5, 32), (1500, 6, 9, 32), (300, 3, 9, 64))
    lr: float = 8e-3
    object_weight: float = 8.0
    kl_weight: float = 1e-6
    pool: int = 6000
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(phase[0] for phase in self.phases)

    def scaled(self, steps: int) -> VideoVAEConfig:
        """The same recipe in so many steps, rounded up in each phase."""
        phases = tuple((math.ceil(phase[0] * steps / self.steps), *phase[1:]) for phase in self.phases)
        return dataclasses.replace(self, phases=phases)


def build_vae() -> AutoencoderKLWan:
    """A light autoencoder; its latents' statistics are set when it has been trained."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        dim_mult=[1, 2, 2],
        z_dim=CHANNELS,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def render_pool(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips [N, 9, 64, 64, 3] uint8 with every kind of fault, and the mover's mean place [N, 2] (x, y in pixels)."""
    rng = np.random.default_rng((seed, 5))
    clips = np.empty((number, FRAMES, SIDE, SIDE, 3), np.uint8)
    centres = np.empty((number, 2), np.int64)
    for i in range(number):
        clip = sample_clip(rng)
        scenes = spoil(clip, rng)[0] if rng.random() < FAULT_RATES[clip.movers[0].speed] / 2 else clip.scenes
        clips[i] = to_clip(scenes, rng, degraded=bool(rng.random() < 0.3))
        centres[i] = np.mean(clip.movers[0].track, axis=0)
    return clips, centres


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] to what the autoencoder takes: [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def draw_crops(
    clips: np.ndarray, centres: np.ndarray, rng: np.random.Generator, batch: int, frames: int, side: int
) -> Tensor:
    """Pixels [batch, 3, frames, side, side]: the first frames of clips, cropped around the middle of the motion.

    Most of a clip is flat background; the crops hold more edges for the same work.
    """
    chosen = np.empty((batch, frames, side, side, 3), np.uint8)
    for b, i in enumerate(rng.integers(len(clips), size=batch)):
        x, y = np.clip(centres[i] + rng.integers(-10, 11, 2) - side // 2, 0, SIDE - side)
        chosen[b] = clips[i, :frames, y : y + side, x : x + side]
    return to_pixels(chosen)


def _decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` without its last clamp to [-1, 1], behind which an overshooting object gets no gradient."""
    vae.clear_cache()
    hidden, frames = vae.post_quant_conv(latents), []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, i : i + 1]
        frames.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


def train_vae(out: Path, config: VideoVAEConfig) -> AutoencoderKLWan:
    """Train the autoencoder, continuing from `out/vae.pt` where that exists; returns the exponential average.

    Huber's loss, the L1 of the gradients in space and time, and a tiny KL. Objects weigh more than the flat background
    at first, edges at last.
    """
    torch.manual_seed(config.seed)
    vae = build_vae()
    with torch.no_grad():  # hardly any noise at first: with the usual one the objects drown for hundreds of steps
        vae.quant_conv.bias[CHANNELS:] = -6.0
    clips, centres = render_pool(config.pool, config.seed)
    starts = np.cumsum([0, *(phase[0] for phase in config.phases)])

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.seed, 3, step))
        _, batch, frames, side = config.phases[int(np.searchsorted(starts, step, side="right")) - 1]
        pixels = draw_crops(clips, centres, rng, batch, frames, side)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.from_numpy(rng.standard_normal(posterior.mean.shape, np.float32))
        error = _decode_unclamped(vae, posterior.mean + posterior.std * noise) - pixels
        progress = step / config.steps
        coloured = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) > 0.3).float()
        around = F.max_pool3d(coloured, (1, 3, 3), 1, (0, 1, 1))
        huber = F.huber_loss(error, torch.zeros_like(error), delta=0.2, reduction="none")
        weight = 1.0 + config.object_weight * (1.0 - progress) * around
        edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3, 4))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        return {
            "huber": 5.0 * (weight * huber).mean(),
            "edges": progress * edges,
            "kl": config.kl_weight * kl,
        }

    def report(average: AutoencoderKLWan, step: int) -> None:
        print(f"vae step {step}: {round_trip_psnr(average, clips[:24]):.2f} dB", flush=True)

    loop = LoopConfig(steps=config.steps, lr=config.lr, ema=0.998, every=400)
    return fit(vae, losses, loop, out / "vae.pt", report, Muon(vae.parameters(), config.lr))


@torch.no_grad()
def finish(vae: AutoencoderKLWan, seed: int = 0, number: int = 400) -> None:
    """Even the latents' principal components out (`vae.spread_to`), then set their statistics in the configuration.

    Wan normalises channel by channel, which would undo that. Hence the components are mixed into all channels alike by
    a Hadamard matrix, and each channel ends with the same standard deviation.
    """
    clips, _ = render_pool(number, seed + 1)
    posteriors = [vae.encode(to_pixels(part)).latent_dist for part in np.array_split(clips, -(-number // 20))]
    means = torch.cat([posterior.mean for posterior in posteriors]).transpose(0, 1).flatten(1).T.double()
    variance = torch.cat([posterior.var for posterior in posteriors]).transpose(0, 1).flatten(1).mean(1).double()
    values = torch.linalg.eigvalsh(torch.cov(means.T)).flip(0)
    rotation = torch.from_numpy(scipy.linalg.hadamard(CHANNELS) / CHANNELS**0.5)
    spread_to(vae, means, variance, values ** (EVENNESS / 2), rotation)
    latents = encode(vae, clips).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: np.ndarray, batch: int = 32) -> Tensor:
    """Latent means [N, 16, 3, 8, 8] of uint8 clips [N, 9, 64, 64, 3], not normalised."""
    parts = [vae.encode(to_pixels(clips[i : i + batch])).latent_dist.mean for i in range(0, len(clips), batch)]
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor, batch: int = 32) -> Tensor:
    """Clips [N, F, 3, H, W] in [0, 1] of latents that are not normalised."""
    parts = [vae.decode(part).sample for part in latents.split(batch)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def round_trip_psnr(vae: AutoencoderKLWan, clips: np.ndarray) -> float:
    """Mean PSNR in dB of decode(encode(x)) over uint8 clips [N, 9, 64, 64, 3]."""
    pixels = torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 255.0
    error = (decode(vae, encode(vae, clips)) - pixels).square().flatten(1).mean(1)
    return float(-10 * torch.log10(error.clamp_min(1e-8)).mean())


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """(z - mean) / std channel by channel, as Wan's pipeline undoes it; latents [N, 16, f, h, w]."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (latents - mean) / std
