"""The reference that preference objectives measure against, and when it follows the policy (arXiv 2505.18736).

    adapter_off      the policy's own weights with LoRA and personal branch switched off: no second model in memory
    copy             a frozen copy of the denoiser as it was before training
    offloaded_copy   the same copy kept in CPU memory and streamed to the device layer by layer

With `train.reference_update` the reference becomes the policy every so many steps (the copy is overwritten, or under a
LoRA an older LoRA is kept), as long as

    D = mean over winners of (err_policy - err_initial) < max_drift

Once this fails, the reference is frozen permanently. The paper leaves open what D is measured on. Here it is the first
winners in the data's order, each with its own noise and at one of evenly spread times, always the same: errors of the
model's native prediction, means over its elements, so that max_drift means the same whatever the objective. Against the
same noise the difference is known far better than either error, and only the initial model's errors must be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from t2i_align.conditioning.personal import NAME as PERSONAL
from t2i_align.config import RunConfig, TrainConfig
from t2i_align.data.batch import Batch, Conditioning
from t2i_align.data.loader import PreferenceDataset
from t2i_align.diffusion.noising import Noised, with_sizes
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.inference.options import PRECISIONS
from t2i_align.objectives.kto import liked_candidates
from t2i_align.training.weights import (
    Variant,
    Weights,
    adapters_off,
    dropout_off,
    frozen_copy,
    older_policy,
    tensors_hash,
)

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

WINNERS = 32


class Reference:
    """The reference weights as objectives call them; they never carry gradients."""

    def __init__(self, pipeline: TrainablePipeline) -> None:
        self.pipeline, self.weights = pipeline, Weights(pipeline.denoiser)

    @torch.no_grad()
    def __call__(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        with self.weights.using("reference") as denoiser:
            return self.pipeline.predict(noisy_latents, timesteps, conditioning, denoiser=denoiser)

    def fingerprint(self) -> str:
        """A hash of its weights, before training: of the frozen base, and of an adapter that is part of it."""
        variant = self.weights.variants["reference"]
        parts = [self.weights.base_hash]
        if variant.tensors:
            parts.append(tensors_hash(variant.tensors))
        return " ".join(parts)

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The frozen denoiser's features of noisy latents, with gradients to these and to nothing else."""
        with self.weights.using("reference") as denoiser:
            return self.pipeline.features(noisy_latents, timesteps, conditioning, denoiser=denoiser)


def build_reference(
    train: TrainConfig,
    pipeline: TrainablePipeline,
    *,
    needed: bool = True,
    adapted: bool = False,
    shard: Callable[[nn.Module], None] = lambda network: None,
) -> Reference:
    """The reference, of the base weights: build it before a checkpoint is loaded into the policy.

    needed: False for objectives without one, so that no second denoiser is kept. adapted: the model before training is
    the base with the LoRA as it is now. shard: divides the denoiser, and a copy of it, among processes.
    """
    denoiser, updated = pipeline.denoiser, train.reference_update is not None
    adapter = bool(getattr(denoiser, "peft_config", None)) or hasattr(denoiser, PERSONAL)
    copied: Variant | None = None
    if needed and (train.reference in ("copy", "offloaded_copy") or not adapter):
        options = {"offload": train.reference == "offloaded_copy", "compile": train.compile, "updated": updated}
        copied = frozen_copy(denoiser, dtype=PRECISIONS[train.precision], shard=shard, **options)
    shard(denoiser)
    reference = Reference(pipeline)
    if needed:
        older = copied or (older_policy(reference.weights) if updated or adapted else adapters_off(denoiser))
        reference.weights.variants["reference"] = older
    return reference


class Winners:
    """The first winners in the run's order, each with its own noise and at one of evenly spread times, always the same.

    initial: the initial model's errors on them, [count], when they have been measured.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        source: PreferenceDataset,
        pipeline: TrainablePipeline,
        count: int = WINNERS,
    ) -> None:
        self.train, self.accelerator, self.source, self.pipeline = config.train, accelerator, source, pipeline
        self.count = count
        self.initial: Tensor | None = None

    @torch.no_grad()
    def errors(self) -> Tensor:
        """The policy's error on each winner, without its LoRA's dropout; NaN for a disliked single sample."""
        with dropout_off(self.pipeline.denoiser).using(), self.accelerator.autocast():
            errors = torch.cat([noised.errors(self.pipeline.predict)[:, 0] for noised, _ in self._noised])
        return torch.where(torch.cat([liked for _, liked in self._noised]), errors, math.nan)

    def means(self) -> tuple[float, float]:
        """The policy's mean error and its rise over the initial model's; all processes get the same."""
        assert self.initial is not None
        errors = self.errors()
        means = torch.stack([errors.nanmean(), (errors - self.initial).nanmean()])
        error, rise = self.accelerator.reduce(means, reduction="mean").tolist()
        return error, rise

    def load_state(self, initial: Tensor | None) -> None:
        """Continue from a checkpoint."""
        self.initial = None if initial is None else initial.to(self.accelerator.device)

    @cached_property
    def _noised(self) -> list[tuple[Noised, Tensor]]:
        """In batches of the run's size, and whether they were liked; on every process the same."""
        items: Iterator[Any] = self.source.loader(
            seed=self.train.seed, start_step=0, batch_size=self.train.batch_size, accumulate=1, rank=0, world=1,
            workers=0,
        )  # fmt: skip
        quantiles = (torch.arange(self.count, device=self.accelerator.device) + 0.5) / self.count
        return [
            self._at(self.source.to_batch(next(items), self.accelerator.device), part)
            for part in quantiles.split(self.train.batch_size)
        ]

    def _at(self, batch: Batch, quantiles: Tensor) -> tuple[Noised, Tensor]:
        """The best candidates of as many groups as there are quantiles of time, and whether they were liked."""
        count, process = len(quantiles), self.pipeline.process
        rng = SampleRNG(self.train.seed, batch.keys[:count], process, device=self.accelerator.device)
        latents, timesteps = batch.latents[:count, 0], process.timesteps(quantiles)
        noise = rng.normal("reference drift", latents.shape[1:])
        sized = with_sizes(batch.conditioning, batch.take([0]))
        conditioning = {name: tensor[:count] for name, tensor in sized.items()}
        liked = liked_candidates(batch.scores)[:count, 0]
        return Noised.at(process, latents, noise, timesteps, conditioning, count), liked


class ReferenceUpdate:
    """When the reference follows the policy. frozen: whether it has stopped permanently."""

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, source: PreferenceDataset, reference: Reference
    ) -> None:
        assert config.train.reference_update is not None
        self.update, self.reference = config.train.reference_update, reference
        self.winners = Winners(config, accelerator, source, reference.pipeline)
        self.frozen = False

    def due(self, step: int) -> bool:
        """Whether to call `follow` after this step; at step 0, that measures the initial model."""
        return not self.frozen and step % self.update.every == 0

    def follow(self) -> dict[str, float]:
        """Become the policy, unless that has drifted; returns what to log. All processes decide alike."""
        if self.winners.initial is None:
            self.winners.initial = self.winners.errors()
            return {}
        _, drift = self.winners.means()
        if drift < self.update.max_drift:
            self.reference.weights.overwrite("reference", self.reference.weights.policy)
        else:
            self.frozen = True
        return {"reference/drift": drift, "reference/frozen": float(self.frozen)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights."""
        return {"frozen": self.frozen, "initial": self.winners.initial}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.frozen = state["frozen"]
        self.winners.load_state(state["initial"])
