"""A reference that follows the policy until it has drifted too far (arXiv 2505.18736).

Every so many steps the reference becomes a hard copy of the policy, as long as

    D = mean over winners of (err_policy - err_initial) < max_drift,

and from the first time that this fails it stays what it is for good. The paper leaves open what D is measured on. Here
it is the first winners of the data's order, each with noise of its own and at one of evenly spread times, always the
same: errors of the model's native prediction, means over its elements, so that max_drift means the same whatever the
objective. Against the same noise the difference is known far better than either error, and of the initial model these
numbers are all that must be kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from t2i_align.config import RunConfig
from t2i_align.data.loader import PreferenceDataset
from t2i_align.data.schema import Batch
from t2i_align.diffusion.noising import Noised, with_sizes
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.training.reference import UpdatableReference, dropout_off

WINNERS = 32
PREFIX = "reference."


class ReferenceUpdate:
    """When a reference follows the policy.

    frozen: whether it has stopped for good. initial: the initial model's errors on the winners, [WINNERS].
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, source: PreferenceDataset, reference: UpdatableReference
    ) -> None:
        assert config.train.reference_update is not None
        self.config, self.update = config, config.train.reference_update
        self.accelerator, self.source, self.reference = accelerator, source, reference
        self.frozen = False
        self.initial: Tensor | None = None
        self._winners: list[tuple[Noised, Tensor]] = []

    def begin(self) -> None:
        """Measure the initial model: call it while the policy still is that."""
        self.initial = self.errors()

    def due(self, step: int) -> bool:
        """Whether the reference would follow after this step."""
        return not self.frozen and step % self.update.every == 0

    def follow(self, trained: dict[str, torch.nn.Parameter]) -> dict[str, float]:
        """Become the policy, unless that has drifted; what to log. All processes come to the same end."""
        assert self.initial is not None
        drift = float(self.accelerator.reduce((self.errors() - self.initial).nanmean(), reduction="mean"))
        if drift < self.update.max_drift:
            self.reference.overwrite(trained)
        else:
            self.frozen = True
        return {"reference/drift": drift, "reference/frozen": float(self.frozen)}

    @torch.no_grad()
    def errors(self) -> Tensor:
        """The policy's error on each winner, without its LoRA's dropout; NaN for a single sample that is disliked."""
        pipeline = self.reference.pipeline
        if not self._winners:
            self._winners = self._noised_winners()
        with dropout_off(pipeline.denoiser), self.accelerator.autocast():
            errors = torch.cat([noised.errors(pipeline.predict)[:, 0] for noised, _ in self._winners])
        return torch.where(torch.cat([liked for _, liked in self._winners]), errors, math.nan)

    def weights(self) -> dict[str, Tensor]:
        """The reference's, under names that tell them from the policy's in a checkpoint."""
        return {PREFIX + name: tensor for name, tensor in self.reference.weights.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights."""
        return {"frozen": self.frozen, "initial": self.initial}

    def load_state(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self.reference.overwrite(
            {name.removeprefix(PREFIX): w for name, w in weights.items() if name.startswith(PREFIX)}
        )
        self.frozen, self.initial = state["frozen"], state["initial"].to(self.accelerator.device)

    def _noised_winners(self) -> list[tuple[Noised, Tensor]]:
        """The first winners of the run's order, in batches of its size; on every process the same."""
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
        draw = SampleRNG(self.config.train.seed, batch.keys[:count], process, device=self.accelerator.device)
        latents, timesteps = batch.latents[:count, 0], process.timesteps(quantiles)
        noise = draw.normal("reference drift", latents.shape[1:])
        noised = Noised(
            latents=process.add_noise(latents, noise, timesteps),
            timesteps=timesteps,
            target=process.target(latents, noise, timesteps),
            conditioning={
                name: tensor[:count] for name, tensor in with_sizes(batch.conditioning, batch.take([0])).items()
            },
            groups=count,
        )
        liked = batch.scores[:count, 0] > 0 if batch.scores.shape[1] == 1 else torch.ones(count, dtype=torch.bool)
        return noised, liked.to(latents.device)
