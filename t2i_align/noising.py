"""How candidates become noisy latents with a target: the first of the three axes an objective chooses on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from t2i_align.data.schema import Batch, Conditioning, Model
from t2i_align.randomness import Draw

Reduction = Literal["mean", "sum"]
NoiseSharing = Literal["shared", "independent"]


@dataclass(frozen=True, kw_only=True)
class Noised:
    """Candidates at a training time, flattened to [B * k, ...] so that one forward pass sees them all."""

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    conditioning: Conditioning
    groups: int

    def errors(self, model: Model, reduction: Reduction = "mean") -> Tensor:
        """Per-candidate squared error of a model's native prediction, [B, k], float32 or better.

        Prediction and target are cast before squaring: rounding an error of 0.1 to bf16 and multiplying by beta
        would put noise of order 1 into the logit.
        """
        prediction = model(self.latents, self.timesteps, self.conditioning)
        dtype = torch.promote_types(self.target.dtype, torch.float32)
        squared = (prediction.to(dtype) - self.target.to(dtype)).square().flatten(1)
        error = squared.mean(1) if reduction == "mean" else squared.sum(1)
        return error.view(self.groups, -1)


def random_noise(batch: Batch, draw: Draw, sharing: NoiseSharing = "shared") -> Noised:
    """x_t = alpha_t x + sigma_t noise at one training time a group.

    `shared`: the candidates of a group get the same noise, as all released code does (Diffusion-DPO, arXiv
    2311.12908, algorithm in appendix); `independent`: each its own, which the objective's derivation permits.
    """
    groups, k, *shape = batch.latents.shape
    noise = draw.normal("noise", (1 if sharing == "shared" else k, *shape)).expand_as(batch.latents)
    timesteps = draw.timesteps().repeat_interleave(k)
    latents, noise = batch.latents.flatten(0, 1), noise.flatten(0, 1)
    return Noised(
        latents=draw.process.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        target=draw.process.target(latents, noise, timesteps),
        conditioning={name: tensor.repeat_interleave(k, dim=0) for name, tensor in batch.conditioning.items()},
        groups=groups,
    )


def drop_captions(batch: Batch, empty: Conditioning, draw: Draw, share: float) -> Batch:
    """The batch with the empty prompt's conditioning for a random `share` of its groups, whole groups at a time.

    empty: the conditioning of one empty prompt, [1, ...].
    """
    if share == 0:
        return batch
    dropped = draw.uniform("caption dropout") < share
    conditioning = {
        name: torch.where(dropped.view(-1, *([1] * (tensor.ndim - 1))), empty[name], tensor)
        for name, tensor in batch.conditioning.items()
    }
    return Batch(
        keys=batch.keys, latents=batch.latents, scores=batch.scores, conditioning=conditioning, extras=batch.extras
    )
