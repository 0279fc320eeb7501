"""Random noise for candidates, and captions that are dropped."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from t2i_align.diffusion.noising import candidates_conditioning, drop_captions, random_noise, repeated
from tests.objectives.toy import random_batch, rich_batch, rng_for

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
    drawn = rng_for(batch, "epsilon").normal("noise", (3, 4, 3, 3))  # by this name, so that runs can be drawn again
    assert torch.equal(apart.target, drawn.flatten(0, 1).to(apart.target)) and not torch.equal(*drawn[0, :2])


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


@pytest.mark.parametrize(("length", "own"), [(1, 2), (2, 2), (4, 2), (3, 1), (64, 2)])
def test_dropped_texts_are_the_empty_one_at_the_longer_of_both_lengths(length: int, own: int) -> None:
    """The prompt's and the captions' of a group together, and nothing that is no text's; zeros fill up."""
    batch = replace(random_batch(64), conditioning={"embeds": torch.ones(64, own, 5), "user": torch.ones(64, 3)})
    batch = replace(batch, columns={"captions": {"embeds": torch.ones(64, 2, own, 5)}, "user": ("fox",) * 64})
    empty = {"embeds": torch.full((1, length, 5), 2.0, dtype=torch.float64), "pooled": torch.zeros(1, 5)}
    assert drop_captions(batch, empty, rng_for(batch, "flow"), 0) is batch
    out = drop_captions(batch, empty, rng_for(batch, "flow"), 0.5)
    there, longer = torch.arange(max(length, own)), max(length, own)
    blank = torch.where(there < length, 2.0, 0.0)[:, None].expand(longer, 5)
    kept = torch.where(there < own, 1.0, 0.0)[:, None].expand(longer, 5)
    embeds = out.conditioning["embeds"]
    dropped = embeds[:, 0, 0] == 2
    assert 16 < dropped.sum() < 48 and embeds.dtype == torch.float32
    assert torch.equal(embeds, torch.where(dropped[:, None, None], blank, kept))
    assert torch.equal(out.captions["embeds"], embeds.unsqueeze(1).expand(-1, 2, -1, -1))
    assert torch.equal(out.conditioning["user"], torch.ones(64, 3)) and out.columns["user"] == ("fox",) * 64
    prompts, blanks = repeated({"embeds": torch.ones(3, own, 5)}, empty, 3)
    assert torch.equal(blanks["embeds"], blank.float().expand(3, -1, -1))
    assert torch.equal(prompts["embeds"], kept.expand(3, -1, -1))


def test_candidates_have_their_own_captions_and_sizes_or_the_prompt() -> None:
    batch = rich_batch(2, 3)
    own = candidates_conditioning(replace(batch, sizes=torch.arange(36.0).view(2, 3, 6)))
    assert torch.equal(own["prompt_embeds"], batch.captions["prompt_embeds"].flatten(0, 1))
    assert own["time_ids"].tolist() == torch.arange(36.0).view(6, 6).tolist()
    shared = candidates_conditioning(replace(batch, columns={}))
    assert shared.keys() == {"prompt_embeds"}
    assert torch.equal(shared["prompt_embeds"][2], batch.conditioning["prompt_embeds"][0])
    assert torch.equal(shared["prompt_embeds"][3], batch.conditioning["prompt_embeds"][1])


def test_half_precision_predictions_are_squared_in_float32() -> None:
    batch = random_batch()
    noised = random_noise(batch, rng_for(batch, "epsilon"))
    errors = noised.errors(lambda x, t, c: noised.target.to(torch.bfloat16))
    assert errors.dtype == torch.float32
    expected = (noised.target.to(torch.bfloat16).float() - noised.target.float()).square().flatten(1).mean(1)
    torch.testing.assert_close(errors.flatten(), expected)
