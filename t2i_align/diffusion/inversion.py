"""Noise by inversion: the probability-flow ODE is followed from the clean latents up, with a model's predictions.

    x_{k+1} = alpha_{k+1} x_hat + sigma_{k+1} noise_hat       x_hat, noise_hat: the model's estimates from x_k at tau_k
    noise*  = (x_tau - alpha_tau x) / sigma_tau               and the native target that follows from it

This is DDIM run backwards (arXiv 2010.02502, eq. 13) for variance-preserving processes and Euler's method for flow, as
`ForwardProcess.step`. InPO (arXiv 2503.18454) and SmPO (arXiv 2506.02698) train on such pairs of x_tau and target.

Latents, timestep and target of a sample belong to one level of one fixed grid; every sample of a batch has a level of
its own. (The released codes take them from three different times, and from the first sample of a batch for all.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2i_align.data.batch import Batch, Conditioning, Model
from t2i_align.diffusion.noising import Noised, NoiseSharing, candidates_conditioning, normal_noise, per_row
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError


@torch.no_grad()
def inverted_noise(
    model: Model,
    batch: Batch,
    rng: SampleRNG,
    *,
    levels: int = 10,
    guidance: float = 1.0,
    eta: float = 0.0,
    renoise: int = 0,
    sharing: NoiseSharing = "shared",
) -> Noised:
    """Candidates inverted to one level per group, drawn from `level_grid`; all that it returns is detached.

    Args:
        model: its predictions drive the ODE.
        levels: number of levels in the grid; each sample takes as many steps as its own needs.
        guidance: classifier-free guidance scale (arXiv 2207.12598); 1 is none, and costs no second call.
        eta: share of fresh noise in [0, 1] (see `advance`): 0 is deterministic, 1 is `random_noise`.
        renoise: corrections of each step (ReNoise, arXiv 2403.14602), with one more call each: the prediction is
            averaged with the one at the point where the step has led, and the step is taken again.
        sharing: `shared` within a group, or `independent`.

    Raises:
        UserError: guidance without the empty prompt's conditioning in the batch.
    """
    process, clean, conditioning = rng.process, batch.latents.flatten(0, 1), candidates_conditioning(batch)
    groups, k = batch.latents.shape[:2]
    grid = level_grid(rng, levels)
    level = [number for number in rng.choice("inversion level", len(grid)) for _ in range(k)]
    latents, now = clean, torch.zeros_like(grid[:1])
    for i in range(max(level) + 1):
        # The others have reached their level.
        rows = rng.moved(torch.tensor([row for row, last in enumerate(level) if last >= i]))
        there = {name: tensor[rows] for name, tensor in conditioning.items()}
        predict, at = guided(model, there, batch.empty, guidance), latents[rows]
        now, to = now.expand(len(rows)), grid[i : i + 1].expand(len(rows))
        fresh = normal_noise(batch, rng, f"inversion noise {i}", sharing)[rows] if eta else None
        # The network knows no cleaner level than timestep 0, but the first latents are clean beyond any table.
        known = at if i == 0 else None
        first = predict(at, now)
        moved = advance(rng, first, at, now, to, known, fresh, eta)
        for _ in range(renoise):
            again = predict(moved, to)
            # Targets of two levels differ even where both see the same image and noise: average them at one.
            again = process.target(process.to_clean(again, moved, to), process.to_noise(again, moved, to), now)
            moved = advance(rng, (first + again) / 2, at, now, to, known, fresh, eta)
        latents, now = latents.index_copy(0, rows, moved), grid[i : i + 1]
    # Autocast caches cast weights, here without their gradient: the policy's own step would train nothing.
    torch.clear_autocast_cache()
    timesteps = grid[rng.moved(torch.tensor(level))]
    alpha, sigma = (per_row(value, clean).to(clean.dtype) for value in process.alpha_sigma(timesteps))
    noise = (latents - alpha * clean) / sigma.clamp_min(torch.finfo(clean.dtype).tiny)  # 0 where sigma is 0
    return Noised(
        latents=latents,
        timesteps=timesteps,
        target=process.target(clean, noise, timesteps),
        conditioning=conditioning,
        groups=groups,
    )


def guided(
    model: Model, conditioning: Conditioning, empty: Conditioning | None, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """(noisy_latents, timesteps) -> prediction under a guidance scale.

    empty: of one empty prompt, [1, ...]; what it does not have, such as an image's size, is the same for both.

    Raises:
        UserError: a scale other than 1 without `empty`.
    """

    def conditional(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return model(noisy, timesteps, conditioning).to(noisy.dtype)

    if guidance == 1:
        return conditional
    if empty is None:
        raise UserError(f"inversion with guidance {guidance} needs the empty prompt's conditioning in the batch")
    nothing = {
        name: empty[name].to(tensor.dtype).expand_as(tensor) if name in empty else tensor
        for name, tensor in conditioning.items()
    }

    def both(noisy: Tensor, timesteps: Tensor) -> Tensor:
        unconditional = model(noisy, timesteps, nothing)
        return unconditional + guidance * (conditional(noisy, timesteps) - unconditional)

    return both


def level_grid(rng: SampleRNG, levels: int) -> Tensor:
    """Increasing timesteps, [K]: the training times' quantiles in the middles of K equal parts, such as 50, 150 … 950.

    A table with fewer entries than `levels` gives each of them once.
    """
    with rng.deciding():
        middles = (torch.arange(levels) + 0.5) / levels
        grid = rng.process.timesteps(middles, rng.timestep_sampling).unique()
    return rng.moved(grid)


def advance(
    rng: SampleRNG,
    model_pred: Tensor,
    latents: Tensor,
    now: Tensor,
    to: Tensor,
    clean: Tensor | None = None,
    fresh: Tensor | None = None,
    eta: float = 0.0,
) -> Tensor:
    """One step up, from the latents at `now` to those at `to` ([B] each), [B, ...].

        noise = sqrt(1 - q^2) noise_hat + q fresh,    q^2 = eta^2 (1 - SNR_to / SNR_now)

    As much as fresh noise comes in, the predicted one is shrunk, so that the variance stays the process's. This is
    DDIM's eta (arXiv 2010.02502, eq. 16) for the way up: with eta = 1 the prediction drops out, and
    x_to = (alpha_to / alpha_now) x_now + noise is the forward process itself.

    clean: the latents without noise where these are known: then SNR_now is infinite.
    """
    process = rng.process
    noise = process.to_noise(model_pred, latents, now)
    if fresh is not None:
        share = torch.full_like(now, eta, dtype=latents.dtype)
        if clean is None:
            (alpha, sigma), (alpha_to, sigma_to) = process.alpha_sigma(now), process.alpha_sigma(to)
            kept = (alpha_to * sigma / (alpha * sigma_to)).square()  # SNR_to / SNR_now; 0 where alpha_to is 0
            share = share * (1 - kept).clamp_min(0).sqrt().to(latents.dtype)
        share = per_row(share, latents)
        noise = (1 - share.square()).sqrt() * noise + share * fresh
    return process.add_noise(process.to_clean(model_pred, latents, now) if clean is None else clean, noise, to)
