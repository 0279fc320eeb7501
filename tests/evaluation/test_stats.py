"""Win rates, mean changes and their intervals against numbers derived by hand and against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as theory

from t2i_align.errors import UserError
from t2i_align.evaluation.stats import compare, outcomes


def test_win_rate_by_hand() -> None:
    """Changes +0.3, -0.1, 0, +0.02, +0.5 with margin 0.02: win, loss, tie, tie, win.

    half: (2 + 2 · 0.5) / 5 = 0.6; drop: 2 / 3. Mean change (0.3 - 0.1 + 0 + 0.02 + 0.5) / 5 = 0.144.
    """
    before, after = [0.5, 0.5, 0.5, 0.5, 0.1], [0.8, 0.4, 0.5, 0.52, 0.6]
    half = compare(before, after, margin=0.02)
    assert (half.n, half.wins, half.losses, half.tied) == (5, 2, 1, 2)
    assert half.win_rate == pytest.approx(0.6)
    assert half.mean_before == pytest.approx(0.42) and half.mean_after == pytest.approx(0.564)
    assert half.mean_change == pytest.approx(0.144)
    drop = compare(before, after, margin=0.02, ties="drop")
    assert drop.win_rate == pytest.approx(2 / 3)
    assert drop.mean_change == half.mean_change
    assert compare(before, after).win_rate == pytest.approx((3 + 0.5) / 5)  # without a margin 0.02 is a win


def test_pairs_with_a_missing_side_are_left_out() -> None:
    """Rows 1 and 2 lack a side; what remains is one win (0 → 1) and one loss (1 → 0)."""
    result = compare([0, math.nan, 1, 1], [1, 1, math.inf, 0], clusters=[0, 1, 2, 3])
    assert (result.n, result.prompts_compared, result.win_rate, result.mean_change) == (2, 2, 0.5, 0.0)
    assert np.isnan(outcomes([math.nan], [1.0]))[0]


def test_scores_of_any_type_are_compared_in_double_precision() -> None:
    """40 scores of 2000 add up to 80000, beyond float16; null in JSON is a missing score."""
    result = compare(np.full(40, 1000, np.float16), np.full(40, 2000, np.float16))
    assert (result.mean_before, result.mean_after, result.mean_change) == (1000, 2000, 1000)
    assert compare(np.full(40, 2000, np.float16), np.full(40, 1000, np.float16)).mean_before == 2000
    result = compare([0, None, 1], [1, 1, None])  # type: ignore[list-item]
    assert (result.n, result.wins) == (1, 1)
    for before, after in (([1.0, None], [2.0, 2.0]), ([1.0, 1.0], [2.0, None])):
        assert outcomes(before, after)[0] == 1 and math.isnan(outcomes(before, after)[1])


def test_nothing_to_compare_is_nan_and_one_prompt_has_no_interval() -> None:
    empty = compare([math.nan], [1.0])
    assert empty.n == 0 and math.isnan(empty.win_rate) and math.isnan(empty.mean_change)
    one = compare([0, 0, 0], [1, 2, 3], clusters=[7, 7, 7])
    assert one.win_rate == 1 and one.prompts_compared == 1 and math.isnan(one.win_rate_ci[0])
    tied = compare([1, 1], [1, 1], ties="drop")
    assert math.isnan(tied.win_rate) and math.isnan(tied.win_rate_ci[1]) and tied.mean_change_ci == (0, 0)


def test_swapping_the_sides_mirrors_everything() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 80))
    one, other = compare(before, after, margin=0.1), compare(after, before, margin=0.1)
    assert one.win_rate == pytest.approx(1 - other.win_rate)
    assert one.win_rate_ci == pytest.approx((1 - other.win_rate_ci[1], 1 - other.win_rate_ci[0]), abs=0.01)
    assert one.mean_change_ci == pytest.approx((-other.mean_change_ci[1], -other.mean_change_ci[0]), abs=0.01)


def test_interval_is_the_binomial_one_for_independent_pairs() -> None:
    """60 wins of 100: a resampled count is Binomial(100, 0.6), whose 2.5 % and 97.5 % points are 50 and 69."""
    after = np.r_[np.ones(60), -np.ones(40)]
    low, high = compare(np.zeros(100), after).win_rate_ci
    expected = theory.binom.ppf([0.025, 0.975], 100, 0.6) / 100
    assert (low, high) == pytest.approx(expected, abs=0.0101)


def test_repeats_of_a_prompt_do_not_narrow_the_interval() -> None:
    """Four identical seeds per prompt carry no more than one; taking them as independent would halve the width."""
    rng = np.random.default_rng(1)
    change = rng.normal(0.1, 1, 64)
    once = compare(np.zeros(64), change)
    copies = compare(np.zeros(256), np.repeat(change, 4), clusters=np.repeat(np.arange(64), 4))
    assert (copies.n, copies.prompts_compared) == (256, 64)
    assert copies.mean_change_ci == pytest.approx(once.mean_change_ci)
    assert copies.win_rate_ci == pytest.approx(once.win_rate_ci)
    wrong = compare(np.zeros(256), np.repeat(change, 4))
    width = [high - low for low, high in (wrong.mean_change_ci, once.mean_change_ci)]
    assert width[0] / width[1] == pytest.approx(0.5, rel=0.05)


def test_few_prompts_have_wilsons_and_students_intervals() -> None:
    """7 of 10 won: the variance of the mean is 10/9 · 2.1 / 100 = 0.02333, that of 9 independent pairs; t = 2.2622 at 9
    degrees of freedom. t²/n = 0.5686; the middle (0.7 + 0.2843) / 1.5686 = 0.6275 and half the width
    2.2622 √(0.21 / 9 + 0.5686 / 36) / 1.5686 = 0.2853.

    Changes 1, 2, -1, 1 have the mean 0.75 and standard deviation 1.2583; t = 3.1824 at 3 degrees of freedom.

    Prompts with the changes 1, 2, 3 and 4: mean 10/4, residuals 6 - 3 · 2.5 = -1.5 and 4 - 2.5 = 1.5, variance
    2/1 · 4.5 / 4² = 0.75²; t = 12.7062 at 1 degree of freedom.

    Of four prompts 2, 2, 2 and 3 of 4 won: the variance of their means, 0.0039, is below that of 16 independent pairs,
    0.0154, and more than all of them cannot be counted: Wilson's interval of 9/16, n = 16, t = 3.1824.
    """
    result = compare(np.zeros(10), [1.0] * 7 + [-1.0] * 3)
    assert result.win_rate_ci == pytest.approx((0.3422, 0.9128), abs=1e-4)
    result = compare(np.zeros(4), [1, 2, -1, 1])
    assert result.mean_change_ci == pytest.approx((0.75 - 2.0022, 0.75 + 2.0022), abs=1e-4)
    result = compare(np.zeros(4), [1, 2, 3, 4], clusters=[0, 0, 0, 1])
    assert result.mean_change_ci == pytest.approx((2.5 - 9.52965, 2.5 + 9.52965), abs=1e-4)
    won = [1, 1, -1, -1] * 3 + [1, 1, 1, -1]
    result = compare(np.zeros(16), won, clusters=np.repeat(range(4), 4))
    assert result.win_rate_ci == pytest.approx((0.228467, 0.848080), abs=1e-5)


def test_the_bootstrap_begins_at_thirty_prompts() -> None:
    change = np.random.default_rng(5).normal(size=30)
    for count in (29, 30):
        few = compare(np.zeros(count), change[:count]).mean_change_ci
        half = theory.t.ppf(0.975, count - 1) * change[:count].std(ddof=1) / math.sqrt(count)
        student = (change[:count].mean() - half, change[:count].mean() + half)
        assert (few == pytest.approx(student)) == (count == 29)
        share = compare(np.zeros(count), [1] * 9 + [-1] * (count - 9)).win_rate_ci
        assert (round(share[0] * count, 6) % 1 == 0) == (count == 30)  # of a bootstrap, a number of wins


@pytest.mark.parametrize(("prompts", "low"), [(2, 0.3424), (10, 0.7225), (30, 0.8865), (400, 0.9905)])
def test_pairs_that_all_agree_have_wilsons_interval(prompts: int, low: float) -> None:
    """n of n won: from n / (n + z²) to 1; all lost mirrors it."""
    clusters = np.repeat(np.arange(prompts), 3)  # what other seeds of the same prompts add is not known
    won, lost = (compare(np.zeros(3 * prompts), np.full(3 * prompts, side), clusters) for side in (1.0, -1.0))
    assert won.win_rate_ci == pytest.approx((low, 1), abs=1e-4) and lost.win_rate_ci == pytest.approx(
        (0, 1 - low), abs=1e-4
    )
    assert won.win_rate_ci[1] <= 1 and lost.win_rate_ci[0] >= 0
    one = compare(np.zeros(10), [0] * 9 + [1], ties="drop")
    assert one.win_rate == 1 and math.isnan(one.win_rate_ci[0])  # a single prompt is decided


@pytest.mark.parametrize(("prompts", "share"), [(5, 0.95), (10, 0.95), (10, 0.73), (20, 0.9)])
def test_interval_of_few_prompts_covers_the_truth(prompts: int, share: float) -> None:
    """2 seeds a prompt, their outcomes correlated by 0.3: at least 95 % of the intervals, less the draw's own error."""
    rng, covered = np.random.default_rng(4), 0
    for _ in range(400):
        chance = rng.beta(share * 7 / 3, (1 - share) * 7 / 3, prompts)  # a + b = (1 - 0.3) / 0.3
        won = rng.random((prompts, 2)) < chance[:, None]
        low, high = compare(np.zeros(2 * prompts), won.ravel() - 0.5, np.repeat(np.arange(prompts), 2)).win_rate_ci
        covered += low <= share <= high
    assert covered / 400 >= 0.93


def test_mean_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Normal changes of mean 0.2, 40 prompts × 2 seeds sharing half their variance: about 95 % of 300 intervals."""
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(40), 2)
    covered = 0
    for _ in range(300):
        change = 0.2 + rng.normal(size=40)[clusters] + rng.normal(size=80)
        low, high = compare(np.zeros(80), change, clusters, resamples=1000).mean_change_ci
        covered += low <= 0.2 <= high
    # Standard error of the coverage is 1.3 %; the percentile bootstrap at 40 prompts is about 1 % short.
    assert 0.90 <= covered / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval_whatever_the_block_size(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    before, after = rng.normal(size=(2, 50))
    one = compare(before, after)
    assert one == compare(before, after, seed=0, resamples=10_000) and one != compare(before, after, seed=1)
    monkeypatch.setattr("t2i_align.evaluation.stats.BLOCK", 1000)
    assert compare(before, after) == one


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"margin": -0.1}, "tie_margin must be a number of at least 0, found -0.1"),
        ({"margin": "0.1"}, "tie_margin must be a number of at least 0, found '0.1'"),
        ({"margin": math.nan}, "tie_margin must be a number of at least 0, found nan"),
        ({"ties": "lose"}, "ties must be 'half' or 'drop', found 'lose'"),
        ({"clusters": [1]}, r"lengths differ: before \(2,\), after \(2,\), prompts \(1,\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        compare([1.0, 2.0], [2.0, 3.0], **arguments)


def test_the_margin_itself_is_a_tie_in_single_precision() -> None:
    before, after = np.float32([0.70, 0.80, 0.30]), np.float32([0.72, 0.82, 0.321])
    assert float(after[0]) - float(before[0]) > 0.02 > float(after[1]) - float(before[1])
    assert outcomes(before, after, margin=0.02).tolist() == [0.5, 0.5, 1.0]
