"""Train the tiny autoencoder of the testbed's bases: an f4 `AutoencoderKL` with four latent channels."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from t2i_align.testbed.scenes import SIDE, degrade, render, sample_scene, to_uint8
from tools.testbed.precision import mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Recipe of the shipped autoencoder; a step sees `batch` images of 64 x 64."""

    steps: int = 2300
    mosaic_steps: int = 1600
    batch: int = 16
    lr: float = 3e-3
    kl_weight: float = 1e-6
    gradient_weight: float = 1.0
    pool: int = 24_000
    degraded: float = 0.4
    seed: int = 0


def build_vae() -> AutoencoderKL:
    """A light f4 autoencoder; no attention in the middle, since nothing in a 64-pixel scene needs it."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def render_pool(number: int, degraded: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 64, 64, 3] uint8 and one object centre each [N, 2] (x, y in pixels)."""
    rng = np.random.default_rng(seed)
    images = np.empty((number, SIDE, SIDE, 3), np.uint8)
    centres = np.empty((number, 2), np.int64)
    for i in range(number):
        scene = sample_scene(rng, stray=bool(rng.random() < 0.25))
        pixels = render(scene)
        if rng.random() < degraded:
            pixels = degrade(pixels, rng)
        images[i] = to_uint8(pixels)
        item = scene.objects[rng.integers(len(scene.objects))]
        centres[i] = int(item.x), int(item.y)
    return images, centres


def _batch(images: np.ndarray, centres: np.ndarray, rng: np.random.Generator, batch: int, mosaic: bool) -> Tensor:
    """A batch [B, 3, 64, 64] in [-1, 1]; mosaics put four 32 x 32 crops around objects into one image.

    Most of a scene is flat background. A mosaic holds about three times as many edges for the same work.
    """
    if not mosaic:
        chosen = images[rng.integers(len(images), size=batch)]
    else:
        half = SIDE // 2
        chosen = np.empty((batch, SIDE, SIDE, 3), np.uint8)
        index = rng.integers(len(images), size=(batch, 4))
        jitter = rng.integers(-10, 11, size=(batch, 4, 2))
        for b in range(batch):
            for k in range(4):
                i = index[b, k]
                x, y = np.clip(centres[i] + jitter[b, k] - half // 2, 0, SIDE - half)
                row, column = divmod(k, 2)
                crop = images[i, y : y + half, x : x + half]
                chosen[b, row * half : (row + 1) * half, column * half : (column + 1) * half] = crop
    pixels = torch.from_numpy(chosen).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


def vae_loss(vae: AutoencoderKL, pixels: Tensor, noise: Tensor, *, kl_weight: float, gradient_weight: float) -> Tensor:
    """L1 + MSE + L1 of the image gradients + a tiny KL that only keeps the latents near unit scale."""
    with mixed():
        moments = vae.quant_conv(vae.encoder(pixels))
        mean, logvar = moments.float().chunk(2, dim=1)
        logvar = logvar.clamp(-30.0, 20.0)
        latents = mean + noise * torch.exp(0.5 * logvar)
        out = vae.decoder(vae.post_quant_conv(latents))
    error = out.float() - pixels
    gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return error.abs().mean() + error.square().mean() + gradient_weight * gradients + kl_weight * kl


def train_vae(out: Path, config: VAEConfig, *, compile_step: bool = True) -> AutoencoderKL:
    """Train and save the autoencoder to `out`, continuing from `out/vae_state.pt` when that exists.

    Every step's data depends on (seed, step) only. The saved weights are an exponential average (decay 0.998)
    whose latents are balanced (`balance_latents`).
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    average = build_vae()
    average.load_state_dict(vae.state_dict())
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    state_file, first = out / "vae_state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    images, centres = render_pool(config.pool, config.degraded, config.seed)
    loss_fn = torch.compile(vae_loss) if compile_step else vae_loss
    begin, log = time.time(), []
    for step in range(first, config.steps):
        rng = np.random.default_rng((config.seed, step))
        pixels = _batch(images, centres, rng, config.batch, mosaic=step < config.mosaic_steps)
        noise = torch.from_numpy(rng.standard_normal((config.batch, 4, SIDE // 4, SIDE // 4), np.float32))
        warm, progress = min(1.0, (step + 1) / 100), step / config.steps
        for group in optimiser.param_groups:
            group["lr"] = config.lr * warm * 0.5 * (1.0 + math.cos(math.pi * progress))
        loss = loss_fn(vae, pixels, noise, kl_weight=config.kl_weight, gradient_weight=config.gradient_weight)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1.0 - decay)
        log.append(loss.detach())
        if (step + 1) % 200 == 0 or step + 1 == config.steps:
            mean = float(torch.stack(log).mean())
            log.clear()
            psnr = round_trip_psnr(average, images[:64])
            print(
                f"vae step {step + 1}/{config.steps} loss {mean:.4f} psnr {psnr:.2f} dB {time.time() - begin:.0f} s",
                flush=True,
            )
            state = {"vae": vae.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save({**state, "step": step + 1}, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    balance_latents(average, images[:400])
    temporary = out / "vae.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    average.save_pretrained(temporary)
    temporary.rename(out / "vae")  # the finished folder is what the next run looks for
    return average


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 64, *, bf16: bool = False) -> Tensor:
    """Unscaled latent means [N, 4, 16, 16] float32 of uint8 images [N, 64, 64, 3]."""
    latents = []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with mixed(bf16):
            moments = vae.quant_conv(vae.encoder(pixels))
        latents.append(moments[:, :4].float().contiguous())
    return torch.cat(latents)


@torch.no_grad()
def round_trip_psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean PSNR in dB of decode(encode(x)) over uint8 images [N, 64, 64, 3]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    out = (vae.decode(encode(vae, images)).sample / 2 + 0.5).clamp(0, 1)
    return float((-10 * torch.log10((out - pixels).square().flatten(1).mean(1).clamp_min(1e-8))).mean())


# Standard deviations that the latents' principal components are given, strongest first. Left alone, the
# background's brightness has 5 to 100 times the spread of what tells colours and shapes, which then drown
# in the noise that decides them; the last component hardly carries anything and stays small.
BALANCE = (1.2, 0.95, 0.75, 0.15)


@torch.no_grad()
def balance_latents(vae: AutoencoderKL, images: np.ndarray, spread: tuple[float, ...] = BALANCE) -> None:
    """Rotate and rescale the latents so that their principal components have the standard deviations `spread`.

    z' = T z - m with T = diag(spread / std) V^T, folded into the 1 x 1 convolutions around the latents: images
    decode as before, in place. The posterior's variance becomes a constant, its mean over `images`.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    posterior = vae.encode(pixels).latent_dist
    means = posterior.mean.permute(0, 2, 3, 1).reshape(-1, 4).double()
    spread_to(vae, means, posterior.var.double().mean((0, 2, 3)), torch.tensor(spread).double())
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def spread_to(vae: Any, means: Tensor, variance: Tensor, spread: Tensor, rotation: Tensor | None = None) -> None:
    """Fold z' = R diag(spread / std) V^T z - m into the 1 x 1 convolutions around the latents of any autoencoder.

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
