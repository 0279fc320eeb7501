"""Win rates over users and prompts, and identification: by hand, at their limits, and covering what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from t2i_align.errors import UserError
from t2i_align.evaluation.personal import identification, win_rate


def test_win_rate_by_hand() -> None:
    """Two users and three prompts: 3 wins, 2 losses and a tie within the margin: 3.5 of 6."""
    before = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    after = np.array([[1.0, 1.0, -1.0], [0.02, 2.0, 0.0]])
    rate = win_rate(before, after, margin=0.05)
    assert rate.rate == pytest.approx(3.5 / 6) and rate.by_user == pytest.approx((2 / 3, 0.5))
    assert rate.interval[0] <= rate.rate <= rate.interval[1]
    twice = win_rate(np.stack([before, before]), np.stack([after, before]), margin=0.05)  # a run that changes nothing
    assert twice.rate == pytest.approx((3.5 / 6 + 0.5) / 2) and twice.by_user == pytest.approx((7 / 12, 0.5))
    with pytest.raises(UserError, match="expected two arrays of users x prompts"):
        win_rate(before, after[:1])


def test_interval_covers_users_and_prompts_alike() -> None:
    """Effects of users and of prompts, each of standard deviation 1: an interval over one of them would be too narrow.

    Of 60 studies of 20 users and 16 prompts, whose true rate is 1/2 by symmetry, about 95 % cover it.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(60):
        effect = rng.standard_normal((20, 1)) + rng.standard_normal((1, 16)) + rng.standard_normal((20, 16))
        low, high = win_rate(np.zeros_like(effect), effect, seed=study).interval
        covered += low <= 0.5 <= high
    assert covered >= 53


def test_identification() -> None:
    """Users who differ are told apart, the same embedding for all is found by chance of ties only."""
    rng = torch.Generator().manual_seed(0)
    users = [torch.eye(8)[i] + 0.05 * torch.randn(4, 8, generator=rng) for i in range(8)]
    assert identification(users)[0] == 1.0
    random = [torch.randn(4, 32, generator=rng) for _ in range(20)]
    share, (low, high) = identification(random, top=5)
    assert low <= share <= high and 0.1 < share < 0.45
