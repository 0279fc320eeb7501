"""The reference that preference objectives measure against, and when it follows the policy (arXiv 2505.18736).

    adapter_off      the policy's own weights with its LoRA switched off: no second model in memory
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
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

from t2i_align.config import RunConfig, TrainConfig
from t2i_align.data.loader import PreferenceDataset
from t2i_align.data.schema import Batch, Conditioning
from t2i_align.diffusion.noising import Noised, with_sizes
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.inference.options import PRECISIONS
from t2i_align.objectives.kto import liked_candidates
from t2i_align.training.weights import Weights, adapters_off, dropout_off, frozen_copy, older_policy

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

    def features(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The frozen denoiser's features of noisy latents, with gradients to these and to nothing else."""
        with self.weights.using("reference") as denoiser:
            return self.pipeline.features(noisy_latents, timesteps, conditioning, denoiser=denoiser)


def build_reference(
    train: TrainConfig, pipeline: TrainablePipeline, *, needed: bool = True, adapted: bool = False
) -> Reference:
    """The reference, of the base weights: build it before a checkpoint is loaded into the policy.

    needed: False for objectives without one, so that no second denoiser is kept. adapted: the model before training is
    the base with the LoRA as it is now.
    """
    reference, denoiser, updated = Reference(pipeline), pipeline.denoiser, train.reference_update is not None
    lora = bool(getattr(denoiser, "peft_config", None))
    if needed and (train.reference in ("copy", "offloaded_copy") or not lora):
        options = {"offload": train.reference == "offloaded_copy", "compile": train.compile, "updated": updated}
        variant = frozen_copy(denoiser, dtype=PRECISIONS[train.precision], **options)
        reference.weights.variants["reference"] = variant
    elif needed:
        older = older_policy(reference.weights) if updated or adapted else adapters_off(denoiser)
        reference.weights.variants["reference"] = older
    return reference


class ReferenceUpdate:
    """When the reference follows the policy.

    frozen: whether it has stopped permanently. initial: the initial model's errors on the winners, [WINNERS].
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, source: PreferenceDataset, reference: Reference
    ) -> None:
        assert config.train.reference_update is not None
        self.config, self.update = config, config.train.reference_update
        self.accelerator, self.source, self.reference = accelerator, source, reference
        self.frozen = False
        self.initial: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether to call `follow` after this step; at step 0, that measures the initial model."""
        return not self.frozen and step % self.update.every == 0

    def follow(self) -> dict[str, float]:
        """Become the policy, unless that has drifted; returns what to log. All processes decide alike."""
        if self.initial is None:
            self.initial = self.errors()
            return {}
        drift = float(self.accelerator.reduce((self.errors() - self.initial).nanmean(), reduction="mean"))
        if drift < self.update.max_drift:
            self.reference.weights.overwrite("reference", self.reference.weights.policy)
        else:
            self.frozen = True
        return {"reference/drift": drift, "reference/frozen": float(self.frozen)}

    @torch.no_grad()
    def errors(self) -> Tensor:
        """The policy's error on each winner, without its LoRA's dropout; NaN for a disliked single sample."""
        pipeline = self.reference.pipeline
        with dropout_off(pipeline.denoiser).using(), self.accelerator.autocast():
            errors = torch.cat([noised.errors(pipeline.predict)[:, 0] for noised, _ in self._winners])
        return torch.where(torch.cat([liked for _, liked in self._winners]), errors, math.nan)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights."""
        return {"frozen": self.frozen, "initial": self.initial}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.frozen, self.initial = state["frozen"], state["initial"].to(self.accelerator.device)

    @cached_property
    def _winners(self) -> list[tuple[Noised, Tensor]]:
        """The first winners in the run's order, in batches of its size; on every process the same."""
        train = self.config.train
        items: Iterator[Any] = self.source.loader(
            seed=train.seed, start_step=0, batch_size=train.batch_size, accumulate=1, rank=0, world=1, workers=0
        )
        quantiles = (torch.arange(WINNERS, device=self.accelerator.device) + 0.5) / WINNERS
        return [
            self._noised(self.source.to_batch(next(items), self.accelerator.device), part)
            for part in quantiles.split(train.batch_size)
        ]

    def _noised(self, batch: Batch, quantiles: Tensor) -> tuple[Noised, Tensor]:
        """The best candidates of as many groups as there are quantiles of time, and whether they were liked."""
        count, process = len(quantiles), self.reference.pipeline.process
        rng = SampleRNG(self.config.train.seed, batch.keys[:count], process, device=self.accelerator.device)
        latents, timesteps = batch.latents[:count, 0], process.timesteps(quantiles)
        noise = rng.normal("reference drift", latents.shape[1:])
        sized = with_sizes(batch.conditioning, batch.take([0]))
        conditioning = {name: tensor[:count] for name, tensor in sized.items()}
        liked = liked_candidates(batch.scores)[:count, 0]
        return Noised.at(process, latents, noise, timesteps, conditioning, count), liked
