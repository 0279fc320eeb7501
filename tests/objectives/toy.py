"""Toy batches, models and forward processes in float64, on which objectives are checked exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.data.batch import Batch, Conditioning
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Objective

ABAR = DDPMScheduler().alphas_cumprod
PROCESSES = {
    "epsilon": VariancePreserving(ABAR, "epsilon"),
    "v_prediction": VariancePreserving(ABAR, "v_prediction"),
    "flow": RectifiedFlow(),
}
KINDS = pytest.mark.parametrize("kind", PROCESSES)
# A group's loss depends on the other groups of its batch, by the papers' design (docs/objectives.md).
DEPENDS_ON_THE_BATCH = ("kto", "tkto", "softrepa")
ROWS = ("keys", "latents", "scores", "conditioning", "sizes", "prompts")  # one entry per group
# Hyper-parameters of the shortest sampling that has steps with and without a gradient.
SHORT: dict[str, dict[str, Any]] = {"reward": {"sampling_steps": 3, "every": 2, "guidance": 2.0}}


def random_batch(groups: int = 4, k: int = 2) -> Batch:
    """Groups of k; the first candidate has score 1, the others 0."""
    generator = torch.Generator().manual_seed(3)
    return Batch(
        keys=tuple(f"0/sample {i}" for i in range(groups)),
        latents=torch.randn(groups, k, 4, 3, 3, generator=generator, dtype=torch.float64),
        scores=torch.tensor([[1.0] + [0.0] * (k - 1)] * groups),
        conditioning={"prompt_embeds": torch.randn(groups, 2, 5, generator=generator, dtype=torch.float64)},
    )


def rich_batch(groups: int = 4, k: int = 2) -> Batch:
    """All that an objective can require: graded scores, captions that differ from the prompt, the empty text."""
    generator = torch.Generator().manual_seed(5)

    def text(*shape: int) -> Conditioning:
        return {"prompt_embeds": torch.randn(*shape, 2, 5, generator=generator, dtype=torch.float64)}

    scores = torch.linspace(1, 0.1, k) * torch.linspace(1, 0.5, groups).unsqueeze(1)
    columns: dict[str, Any] = {"captions": text(groups, k), "negative_caption": text(groups)}
    # Every other group's only frame is labelled the other way round.
    columns["segment_scores"] = (scores * (-1.0) ** torch.arange(groups).unsqueeze(1)).unsqueeze(2)
    columns["segment_seconds"] = (1.0,) * groups
    return replace(random_batch(groups, k), scores=scores, columns=columns, empty=text(1))


def same_captions(batch: Batch) -> Batch:
    """Every caption is the prompt."""
    embeds = batch.conditioning["prompt_embeds"]
    captions = {"prompt_embeds": embeds.unsqueeze(1).expand(-1, batch.latents.shape[1], -1, -1)}
    return replace(batch, columns={"captions": captions, "negative_caption": {"prompt_embeds": embeds}})


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A batch of the selected groups."""

    def cut(value: Any) -> Any:
        return {name: t[rows] for name, t in value.items()} if isinstance(value, dict) else value[rows]

    values = {name: getattr(batch, name) for name in ROWS}
    columns = {name: cut(value) for name, value in batch.columns.items()}
    return replace(batch, columns=columns, **{name: cut(value) for name, value in values.items() if value is not None})


def as_required(batch: Batch, objective: Objective) -> Batch:
    """The candidates, columns and state that an objective takes, as the data layer and the trainer hand them over."""
    needs = objective.needs
    if needs.candidates == 2 and not needs.lists:
        batch = batch.take([0, batch.latents.shape[1] - 1])
    return replace(
        batch,
        columns={name: value for name, value in batch.columns.items() if name in needs.columns},
        state={name: torch.tensor(value) for name, value in objective.initial_state().items()},
        prompts=tuple("x" * (row + 1) for row in range(len(batch.keys))) if needs.scorer else (),
        rewarder=long_and_bright if needs.scorer else None,
    )


def long_and_bright(latents: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """A differentiable score of clean latents and prompts."""
    bright = torch.tanh(latents.flatten(1)).mean(1)
    return bright * torch.tensor([float(len(prompt)) for prompt in prompts]).to(bright), {"bright": bright}


def linear_model(seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """A model and its parameter; the output depends on latents, time and conditioning of its own row alone."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def model(noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        mixed = torch.einsum("bchw,cd->bdhw", noisy, weight)
        bias = conditioning["prompt_embeds"].mean((1, 2)) + timesteps / 1000
        return mixed + bias.view(-1, 1, 1, 1)

    return model, weight


def bounded_model(seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """`linear_model` with outputs in (-1, 1): its matrix would grow latents a hundredfold over ten inversion steps."""
    model, weight = linear_model(seed)
    return lambda *inputs: torch.tanh(model(*inputs)), weight


class FeatureReference:
    """A reference with features of its own, differentiable in the noisy latents; identity: the latents themselves."""

    def __init__(self, seed: int, *, bounded: bool = False, identity: bool = False) -> None:
        self.model, self.weight = (bounded_model if bounded else linear_model)(seed)
        self.identity = identity
        self.kernel = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.model(noisy, timesteps, conditioning)

    def features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if self.identity:
            return noisy
        place = conditioning["prompt_embeds"].mean((1, 2)) + timesteps / 1000
        return torch.tanh(torch.einsum("bchw,cd->bdhw", noisy, self.kernel) + place.view(-1, 1, 1, 1))


def rng_for(batch: Batch, kind: str) -> SampleRNG:
    return SampleRNG(7, batch.keys, PROCESSES[kind])


def loss_and_gradient(
    objective: Objective, batch: Batch, kind: str, policy_seed: int = 0, reference_seed: int = 1, bounded: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss [B], gradient of its sum in the policy's parameter, metrics."""
    policy, weight = (bounded_model if bounded else linear_model)(policy_seed)
    reference = FeatureReference(reference_seed, bounded=bounded)
    loss, metrics = objective.step(policy, reference, batch, rng_for(batch, kind))
    assert loss.dtype == torch.float64 and all(not value.requires_grad for value in metrics.values())
    return loss, torch.autograd.grad(loss.sum(), weight)[0], metrics


def assert_equal_objectives(one: Objective, other: Objective, batch: Batch, kind: str) -> None:
    """Equal losses and gradients."""
    for left, right in zip(
        loss_and_gradient(one, batch, kind)[:2], loss_and_gradient(other, batch, kind)[:2], strict=True
    ):
        torch.testing.assert_close(left, right)
