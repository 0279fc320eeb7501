"""DenseDPO: what follows from one link per latent frame, in float64, for each forward process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_align.data.batch import Batch
from t2i_align.objectives import DenseDPO, DiffusionDPO, Objective
from t2i_align.objectives.dense_dpo import decided_mean
from t2i_align.objectives.diffusion_dpo import dpo_logit, link_loss
from tests.objectives.toy import KINDS, random_batch, rng_for, rows_of

GROUPS, FRAMES = 4, 6
ALL = ((1,) * FRAMES,) * GROUPS
MIXED = ((1, -1, 0, 1, 0, -1), (0, 0, 0, 0, 0, 1), (-1, -1, -1, 1, 1, 1), (1, 0, 0, 0, 0, 0))


def clips(labels: Any = MIXED, frames: int = FRAMES) -> Batch:
    """Pairs of clips; the first clip's score exceeds the second's by the label."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(GROUPS, 2, 4, frames, 3, 3, generator=generator, dtype=torch.float64)
    signs = torch.tensor(labels, dtype=torch.float64)
    columns = {"segment_scores": torch.stack([signs, torch.zeros_like(signs)], 1), "segment_seconds": (1.0,) * GROUPS}
    return replace(random_batch(GROUPS), latents=latents, columns=columns)


def model(seed: int) -> tuple[Callable[..., Tensor], Tensor]:
    """Each frame is predicted from itself alone."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return lambda noisy, timesteps, _: torch.einsum("bcfhw,cd->bdfhw", noisy, weight), weight


def outcome(objective: Objective, batch: Batch, kind: str, policy_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Loss [B], and the gradient of its sum."""
    (policy, weight), (reference, _) = model(policy_seed), model(1)
    loss, metrics = objective.step(policy, reference, batch, rng_for(batch, kind))
    assert loss.shape == (GROUPS,) or len(batch.keys) != GROUPS
    assert all(value.shape == loss.shape for value in metrics.values())
    return loss.detach(), torch.autograd.grad(loss.sum(), weight)[0]


def assert_alike(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_both_variants_by_hand() -> None:
    """beta 2, so h_f = -l_f (d_a - d_b): differences 1, 3 and 5 with labels 1, -1 and 0 give h = -1, 3, and none.

    per_frame: (log(1 + e) + log(1 + e^-3)) / 2; per_clip: log(1 + e^-1), since the mean of h is 1.
    """
    err_a, zero, labels = torch.tensor([[1.0, 3.0, 5.0]]), torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 0.0]])
    h = labels * dpo_logit(err_a, zero, zero, zero, beta=2.0)
    per_frame, per_clip = decided_mean(link_loss(h), labels != 0), link_loss(decided_mean(h, labels != 0))
    assert per_frame.item() == pytest.approx((math.log1p(math.e) + math.log1p(math.exp(-3))) / 2)
    assert per_clip.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert decided_mean(h, labels == 2).item() == 0
    assert decided_mean(torch.tensor([[math.nan, 4.0]]), torch.tensor([[True, True]])).item() == 4


@KINDS
@pytest.mark.parametrize("variant", ["per_frame", "per_clip"])
def test_the_objective_is_its_equation(variant: str, kind: str) -> None:
    """From errors of each frame that are computed here."""
    batch, (policy, _), (reference, _) = clips(), model(0), model(1)
    noised = DenseDPO().noised(policy, reference, batch, rng_for(batch, kind))
    errors = []
    for network in (policy, reference):
        residuals = noised.residuals(network).unflatten(2, (4, FRAMES, 9))
        errors.append(residuals.square().mean((2, 4)))  # [B, 2, f]
    labels = torch.tensor(MIXED, dtype=torch.float64)
    h = labels * dpo_logit(errors[0][:, 0], errors[0][:, 1], errors[1][:, 0], errors[1][:, 1], beta=3.0)
    decided = labels != 0
    frames, whole = decided_mean(link_loss(h), decided), link_loss(decided_mean(h, decided))
    loss, _ = outcome(DenseDPO(beta=3.0, variant=variant), batch, kind)
    torch.testing.assert_close(loss, (frames if variant == "per_frame" else whole).detach())


@KINDS
@pytest.mark.parametrize("variant", ["per_frame", "per_clip"])
def test_with_one_frame_it_is_diffusion_dpo(variant: str, kind: str) -> None:
    batch = clips(((1,),) * GROUPS, frames=1)
    assert_alike(
        outcome(DenseDPO(beta=3.0, variant=variant), batch, kind), outcome(DiffusionDPO(beta=3.0), batch, kind)
    )


@KINDS
def test_equal_labels_are_the_whole_clips_label(kind: str) -> None:
    """Exactly in one link for the clip; of one for each frame only the gradient at h = 0, where it is linear."""
    batch, whole = clips(ALL), DiffusionDPO(beta=3.0)
    assert_alike(outcome(DenseDPO(beta=3.0, variant="per_clip"), batch, kind), outcome(whole, batch, kind))
    frames = DenseDPO(beta=3.0)
    assert_alike(outcome(frames, batch, kind, policy_seed=1), outcome(whole, batch, kind, policy_seed=1))
    assert (outcome(frames, batch, kind)[0] - outcome(whole, batch, kind)[0]).abs().min() > 1e-4


@KINDS
@pytest.mark.parametrize("options", [{}, {"variant": "per_clip"}, {"guard": 0.5, "noise": "independent"}], ids=str)
def test_ties_change_neither_loss_nor_gradient(options: dict[str, Any], kind: str) -> None:
    batch = clips()
    tied = (torch.tensor(MIXED) == 0)[:, None, None, :, None, None]
    other = replace(batch, latents=torch.where(tied, 9 * batch.latents + 1, batch.latents))
    assert not torch.equal(other.latents, batch.latents)
    objective = DenseDPO(beta=3.0, **options)
    assert_alike(outcome(objective, batch, kind), outcome(objective, other, kind))


@pytest.mark.parametrize("variant", ["per_frame", "per_clip"])
def test_a_clip_without_a_preference_teaches_nothing(variant: str) -> None:
    loss, gradient = outcome(DenseDPO(variant=variant), clips(((0,) * FRAMES,) * GROUPS), "flow")
    assert torch.equal(loss, torch.zeros_like(loss)) and torch.equal(gradient, torch.zeros_like(gradient))


@KINDS
def test_a_flipped_label_flips_the_logit(kind: str) -> None:
    """With one decided frame the loss is -log sigmoid(h): log sigmoid(h) - log sigmoid(-h) = h."""
    (one, _), (other, _) = (
        outcome(DenseDPO(beta=3.0), clips(((0, sign, 0, 0, 0, 0),) * GROUPS), kind) for sign in (1, -1)
    )
    torch.testing.assert_close(torch.exp(-one) + torch.exp(-other), torch.ones_like(one))
    assert (one - other).abs().min() > 1e-3


@KINDS
@pytest.mark.parametrize("options", [{}, {"variant": "per_clip"}, {"chunk": 2}, {"guard": 0.5}], ids=str)
def test_a_batch_equals_its_rows(options: dict[str, Any], kind: str) -> None:
    batch, objective = clips(), DenseDPO(beta=3.0, **options)
    loss, gradient = outcome(objective, batch, kind)
    rows = [outcome(objective, rows_of(batch, slice(i, i + 1)), kind) for i in range(GROUPS)]
    torch.testing.assert_close(loss, torch.cat([row[0] for row in rows]))
    torch.testing.assert_close(gradient, sum(row[1] for row in rows))


def test_a_chunk_is_a_stretch_of_the_clip_with_its_labels() -> None:
    """Every stretch is drawn, a clip's two sides have the same, and its labels come with it."""
    batch = clips(MIXED)
    numbers = torch.arange(FRAMES, dtype=torch.float64).view(-1, 1, 1)
    batch = replace(batch, latents=numbers.expand(GROUPS, 2, 4, FRAMES, 3, 3))
    seen = set()
    for epoch in range(30):
        keyed = replace(batch, keys=tuple(f"{epoch}/{n}" for n in range(GROUPS)))
        part = DenseDPO(chunk=2)._chunk(keyed, rng_for(keyed, "flow"))
        assert part.latents.shape == (GROUPS, 2, 4, 2, 3, 3)
        first = part.latents[:, 0, 0, 0, 0, 0].long()
        assert torch.equal(part.latents[:, 0], part.latents[:, 1])
        assert torch.equal(part.latents[:, 0, 0, 1, 0, 0].long(), first + 1)
        for row, start in enumerate(first.tolist()):
            assert part.segment_scores[row, 0].tolist() == list(MIXED[row][start : start + 2])
        seen |= set(first.tolist())
    assert seen == set(range(FRAMES - 1))
    assert DenseDPO(chunk=FRAMES)._chunk(batch, rng_for(batch, "flow")) is batch
