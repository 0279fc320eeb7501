"""Random noise for candidates, and captions that are dropped."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from t2i_align.diffusion.noising import drop_captions, random_noise
from tests.objectives.toy import random_batch, rng_for

LOG_2 = math.log(2)


def test_noise_is_shared_or_independent_and_time_is_per_group() -> None:
    batch = replace(random_batch(), latents=torch.zeros(4, 3, 4, 3, 3))
    shared = random_noise(batch, rng_for(batch, "epsilon"), "shared")
    apart = random_noise(batch, rng_for(batch, "epsilon"), "independent")
    for noised, equal in ((shared, True), (apart, False)):
        target = noised.target.view(4, 3, -1)
        assert torch.equal(target[:, 0], target[:, 1]) is equal
        times = noised.timesteps.view(4, 3)
        assert (times == times[:, :1]).all()
    assert not torch.equal(shared.target[0], shared.target[3])


def test_captions_are_dropped_for_whole_groups_at_the_given_rate() -> None:
    batch = replace(random_batch(), keys=tuple(f"0/{i}" for i in range(2000)))
    batch = replace(
        batch, latents=torch.zeros(2000, 2, 1, 1, 1), conditioning={"prompt_embeds": torch.ones(2000, 2, 5)}
    )
    empty = {"prompt_embeds": torch.zeros(1, 2, 5)}
    dropped = drop_captions(batch, empty, rng_for(batch, "flow"), 0.2).conditioning["prompt_embeds"]
    rows = dropped.mean((1, 2))
    assert set(rows.tolist()) == {0.0, 1.0}
    assert (rows == 0).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_half_precision_predictions_are_squared_in_float32() -> None:
    batch = random_batch()
    noised = random_noise(batch, rng_for(batch, "epsilon"))
    errors = noised.errors(lambda x, t, c: noised.target.to(torch.bfloat16))
    assert errors.dtype == torch.float32
    expected = (noised.target.to(torch.bfloat16).float() - noised.target.float()).square().flatten(1).mean(1)
    torch.testing.assert_close(errors.flatten(), expected)
