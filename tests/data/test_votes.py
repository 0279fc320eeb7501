"""Rules that combine several scorers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i_align.data.votes import RULES, majority, mean_rank, total


def test_majority_of_a_pair_is_the_share_of_votes() -> None:
    """Two of three prefer the second: 1/3 and 2/3. One that cannot tell gives half to each: (1 + 1/2) / 2."""
    np.testing.assert_allclose(majority(np.array([[1, 2], [5, 3], [0, 9]])), [1 / 3, 2 / 3])
    np.testing.assert_allclose(majority(np.array([[2, 1], [4, 4]])), [0.75, 0.25])
    np.testing.assert_allclose(majority(np.array([[2, 1], [1, 2]])), [0.5, 0.5])


def test_majority_of_several_is_the_mean_of_pairwise_wins() -> None:
    """k = 3, n = 2. Scorer one: a > b > c, wins 2, 1, 0. Scorer two: b > a = c, wins 1/2, 2, 1/2. Over n(k - 1) = 4."""
    scores = np.array([[3, 2, 1], [10, 90, 10]])
    np.testing.assert_allclose(majority(scores), [2.5 / 4, 3 / 4, 0.5 / 4])
    np.testing.assert_allclose(mean_rank(scores), [-1.75, -1.5, -2.75])  # (1 + 2.5) / 2, (2 + 1) / 2, (3 + 2.5) / 2
    np.testing.assert_allclose(total(scores), [13, 92, 11])


def test_margins_make_small_differences_ties() -> None:
    """The first scorer's 0.01 is no preference, so its vote is halved: (1/2 + 1) / 2 and (1/2 + 0) / 2."""
    scores = np.array([[0.50, 0.51], [7.0, 3.0]])
    np.testing.assert_allclose(majority(scores), [0.5, 0.5])
    np.testing.assert_allclose(majority(scores, [0.02, 0.0]), [0.75, 0.25])


@given(
    scores=st.integers(1, 4).flatmap(
        lambda n: st.integers(1, 5).flatmap(
            lambda k: st.lists(st.lists(st.integers(-3, 3), min_size=k, max_size=k), min_size=n, max_size=n)
        )
    )
)
def test_majority_orders_like_mean_rank_and_averages_one_half(scores: list[list[int]]) -> None:
    phi = majority(np.array(scores))
    assert (phi >= 0).all() and (phi <= 1).all()
    np.testing.assert_allclose(phi.mean(), 0.5)
    if len(phi) > 1:
        np.testing.assert_allclose(phi, (len(phi) + mean_rank(np.array(scores))) / (len(phi) - 1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], [[1.0, float("nan")]]])
def test_votes_need_finite_numbers(rule: str, scores: list) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        RULES[rule](np.array(scores), None)
