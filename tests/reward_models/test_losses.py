"""Losses of preference models: numbers derived by hand, ties, rankings, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch

from t2i_align.reward_models import losses

LOG2 = math.log(2)


def value(name: str, r: list[float], labels: list[float]) -> float:
    return float(losses.LOSSES[name](torch.tensor(r, dtype=torch.float32), torch.tensor(labels)))


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_a_pair_is_bradley_terry_in_all_of_them(name: str) -> None:
    """-log σ(1.5 - 0.5) = log(1 + e^-1) = 0.313262; at equal scores it is log 2."""
    assert value(name, [1.5, 0.5], [1, 0]) == pytest.approx(0.313262, abs=1e-6)
    assert value(name, [0.5, 1.5], [0, 1]) == pytest.approx(0.313262, abs=1e-6)
    assert value(name, [3.0, 3.0], [1, 0]) == pytest.approx(LOG2)


def test_pickscores_tie_is_zero_where_the_scores_agree_and_only_there() -> None:
    """p = (½, ½): -½ log σ(1) - ½ log σ(-1) - log 2 = ½ (0.313262 + 1.313262) - 0.693147 = 0.120115."""
    assert value("pickscore", [2.0, 2.0], [0.5, 0.5]) == pytest.approx(0, abs=1e-7)
    assert value("pickscore", [1.0, 0.0], [0.5, 0.5]) == pytest.approx(0.120115, abs=1e-6)


def test_ties_teach_hpsv2_and_imagereward_nothing() -> None:
    for name in ("hpsv2", "imagereward"):
        r = torch.tensor([1.0, 0.0], requires_grad=True)
        loss = losses.LOSSES[name](r, torch.tensor([0.5, 0.5]))
        loss.backward()
        assert loss == 0 and r.grad is not None and not r.grad.any()


def test_rankings() -> None:
    """r = (2, 1, 0): -log softmax of the best is 0.407606; ImageReward has (2 · 0.313262 + 0.126928) / 3 = 0.251151."""
    assert value("hpsv2", [2, 1, 0], [3, 2, 1]) == pytest.approx(0.407606, abs=1e-6)
    assert value("imagereward", [2, 1, 0], [3, 2, 1]) == pytest.approx(0.251151, abs=1e-6)
    assert value("imagereward", [2, 1, 0], [3, 2, 2]) == pytest.approx((0.313262 + 0.126928) / 2, abs=1e-6)


def test_btt_is_a_distribution_over_win_tie_and_loss() -> None:
    """exp(-loss) of the three outcomes adds up to 1, whatever the difference; a tie is likeliest at none."""
    for gap in (-3.0, -0.4, 0.0, 1.7):
        chances = [math.exp(-value("btt", [gap, 0.0], labels)) for labels in ([1, 0], [0, 1], [1, 1])]
        assert sum(chances) == pytest.approx(1, abs=1e-5)
    assert value("btt", [0, 0], [1, 1]) < value("btt", [1, 0], [1, 1])


def test_groups_of_any_size_in_one_batch() -> None:
    scores = torch.tensor([1.5, 0.5, 2.0, 1.0, 0.0])
    labels = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 2.0, 1.0])]
    expected = torch.tensor([0.313262, 0.251151])
    torch.testing.assert_close(losses.per_group("imagereward", scores, labels), expected, atol=1e-5, rtol=0)
    shares = losses.right(torch.tensor([0.0, 1.0, 2.0, 2.0, 0.0]), labels)
    torch.testing.assert_close(shares, torch.tensor([0.0, 2.5 / 3]))  # the draw of the first two counts half
    assert losses.right(torch.tensor([1.0, 0.0]), [torch.tensor([1.0, 1.0])]).isnan()
