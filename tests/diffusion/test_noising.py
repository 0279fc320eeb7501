"""Random noise for candidates, and captions that are dropped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data.loader import open_source
from t2i_align.data.schema import Batch, Model
from t2i_align.diffusion.inversion import advance, inverted_noise, level_grid
from t2i_align.diffusion.noising import Noised, drop_captions, random_noise, squared_error
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives import DCPO, DMPO, DSPO, LCPO, NCPDPO, SFT, TDPO, TKTO, DiffusionDPO, DiffusionKTO, DiffusionLPO, InPO, MaPO, RankDPO, SmPO, SoftREPA, get
from t2i_align.objectives.base import DataStats, Objective, Requirements
from t2i_align.objectives.diffusion_dpo import dpo_logit, link_loss
from t2i_align.objectives.dmpo import dmpo_loss
from t2i_align.objectives.dspo import dspo_loss
from t2i_align.objectives.kto import kto_loss, liked_candidates
from t2i_align.objectives.lcpo import trust
from t2i_align.objectives.lpo import plackett_luce_loss
from t2i_align.objectives.mapo import mapo_loss, shrinking
from t2i_align.objectives.ncp import posterior_step
from t2i_align.objectives.pairwise import safeguard, scale_gradient
from t2i_align.objectives.rankdpo import dcg_weights, rankdpo_loss, win_rates
from t2i_align.objectives.smpo import certainty
from t2i_align.objectives.softrepa import contrastive_loss, different_prompts, shifted
from tests.objectives.toy import KINDS, PROCESSES, FeatureReference, assert_equal_objectives, bounded_model, linear_model, loss_and_gradient, random_batch, rich_batch, rng_for, rows_of, same_captions
from tests.data.test_examples import StandIn, write_images, write_jsonl

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


def test_captions_are_dropped_for_whole_groups_and_at_the_asked_rate() -> None:
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
