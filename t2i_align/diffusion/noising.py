"""How candidates become noisy latents with a target: the first of the three axes an objective chooses on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from t2i_align.data.batch import Batch, Conditioning, Model
from t2i_align.data.schema import COLUMNS
from t2i_align.diffusion.randomness import SampleRNG

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import ForwardProcess

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

    @classmethod
    def at(
        cls, process: ForwardProcess, clean: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning,
        groups: int,
    ) -> Noised:  # fmt: skip
        """Clean latents [B * k, ...] at given times [B * k] under given noise, with the native target."""
        return cls(
            latents=process.add_noise(clean, noise, timesteps),
            timesteps=timesteps,
            target=process.target(clean, noise, timesteps),
            conditioning=conditioning,
            groups=groups,
        )

    def residuals(self, model: Model) -> Tensor:
        """A model's native prediction minus the target, [B, k, D], float32 or better.

        Both are cast before the difference is squared: rounding an error of 0.1 to bf16 and multiplying by beta
        would put noise of order 1 into the logit.
        """
        prediction = model(self.latents, self.timesteps, self.conditioning)
        dtype = torch.promote_types(torch.promote_types(prediction.dtype, self.target.dtype), torch.float32)
        difference = prediction.to(dtype) - self.target.to(dtype)
        return difference.flatten(1).unflatten(0, (self.groups, -1))

    def errors(self, model: Model, reduction: Reduction = "mean") -> Tensor:
        """Per-candidate squared error of a model's native prediction, [B, k], float32 or better."""
        return squared_error(self.residuals(model), reduction)

    def errors_against(self, policy: Model, reference: Model) -> tuple[Tensor, Tensor]:
        """Mean errors [B, k] of the policy and, without gradient, of the reference.

        The reference runs first: its memory is free again before the policy's activations take theirs.
        """
        with torch.no_grad():
            ref_err = stored_errors(reference)
            if ref_err is None:
                ref_err = keep_errors(reference, self.errors(reference))
        return self.errors(policy), ref_err


def stored_errors(reference: Model) -> Tensor | None:
    """The reference's errors on the batch, [B, k], where an earlier run has stored them (`train.store_reference`)."""
    stored: Tensor | None = getattr(reference, "stored", None)
    return stored


def keep_errors(reference: Model, errors: Tensor) -> Tensor:
    """The errors [B, k] that were computed, which a reference that stores them keeps."""
    if (keep := getattr(reference, "keep", None)) is not None:
        keep(errors)
    return errors


def squared_error(residuals: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared error over the last dimension: its mean, or its sum."""
    squared = residuals.square()
    return squared.mean(-1) if reduction == "mean" else squared.sum(-1)


def random_noise(batch: Batch, rng: SampleRNG, sharing: NoiseSharing = "shared") -> Noised:
    """x_t = alpha_t x + sigma_t noise at one training time per group.

    `shared`: the candidates of a group get the same noise, as all released code does (Diffusion-DPO, arXiv
    2311.12908, algorithm in appendix); `independent`: each its own, which the objective's derivation permits.
    """
    groups, k = batch.latents.shape[:2]
    timesteps, noise = rng.timesteps().repeat_interleave(k), normal_noise(batch, rng, "noise", sharing)
    conditioning = candidates_conditioning(batch)
    return Noised.at(rng.process, batch.latents.flatten(0, 1), noise, timesteps, conditioning, groups)


def normal_noise(batch: Batch, rng: SampleRNG, name: str, sharing: NoiseSharing) -> Tensor:
    """Standard normal numbers for each candidate, [B * k, ...]; `shared` gives those of a group the same."""
    _, k, *shape = batch.latents.shape
    return rng.normal(name, (1 if sharing == "shared" else k, *shape)).expand_as(batch.latents).flatten(0, 1)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """One value per row, [B], to [B, 1, ...] with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def candidates_conditioning(batch: Batch) -> Conditioning:
    """What each candidate is denoised under, [B * k, ...]: its own caption where the batch has these, or the prompt;
    and its own size, for families conditioned on it."""
    if batch.captions is not None:
        return with_sizes({name: tensor.flatten(0, 1) for name, tensor in batch.captions.items()}, batch)
    k = batch.latents.shape[1]
    return with_sizes({name: tensor.repeat_interleave(k, dim=0) for name, tensor in batch.conditioning.items()}, batch)


def with_sizes(conditioning: Conditioning, batch: Batch) -> Conditioning:
    """The texts' conditioning, [B * k, ...], with each candidate's size and crop for families conditioned on them."""
    return conditioning if batch.sizes is None else {**conditioning, "time_ids": batch.sizes.flatten(0, 1)}


def drop_captions(batch: Batch, empty: Conditioning, rng: SampleRNG, share: float) -> Batch:
    """The batch with the empty prompt's conditioning for a random `share` of its groups, whole groups at a time.

    empty: the conditioning of one empty prompt, [1, ...]. Where its sequences are of another length than the batch's,
    the shorter are padded with zeros.
    """
    if share == 0:
        return batch
    dropped = rng.uniform("caption dropout") < share

    def emptied(conditioning: Conditioning) -> Conditioning:
        out = {}
        for name, tensor in conditioning.items():
            if name not in empty:  # it is no text's, such as a user's rows
                out[name] = tensor
                continue
            blank, tensor = _padded_alike(empty[name].to(tensor.dtype), tensor)
            out[name] = torch.where(per_row(dropped, tensor), blank, tensor)
        return out

    return replace(
        batch,
        conditioning=emptied(batch.conditioning),
        columns={
            name: emptied(value) if COLUMNS[name].text else value  # what is encoded like the prompt is dropped with it
            for name, value in batch.columns.items()
        },
    )


def _padded_alike(blank: Tensor, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences [1, length, ...] and [..., length, ...], at the longer of the two lengths."""
    if blank.ndim < 2 or blank.shape[1] == tensor.shape[1 - blank.ndim]:
        return blank, tensor
    missing = tensor.shape[1 - blank.ndim] - blank.shape[1]
    padding = [0, 0] * (blank.ndim - 2) + [0, abs(missing)]
    return (pad(blank, padding), tensor) if missing > 0 else (blank, pad(tensor, padding))


def repeated(conditioning: Conditioning, empty: Conditioning, count: int) -> tuple[Conditioning, Conditioning]:
    """Prompts' conditioning [B, ...] and the empty prompt's [1, ...] repeated, with sequences equally long."""
    pairs = {name: _padded_alike(empty[name].to(value.dtype), value) for name, value in conditioning.items()}
    return (
        {name: value for name, (_, value) in pairs.items()},
        {name: blank.expand(count, *blank.shape[1:]) for name, (blank, _) in pairs.items()},
    )
