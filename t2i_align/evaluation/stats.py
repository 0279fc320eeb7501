"""Win rates and mean changes of paired scores, with bootstrap intervals over prompts.

A pair is one prompt and seed, scored before and after. The interval is the percentile bootstrap (Efron 1979): whole
prompts are drawn with replacement, because several seeds of one prompt are not independent. It covers other prompts
from the same source, not other training runs. Below some 30 prompts it is too narrow, and where all of them agree it
has no width; see `interval` for what stands in its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, norm, t

from t2i_align.errors import UserError

Ties = Literal["half", "drop"]
Interval = tuple[float, float]
Array = NDArray[np.float64]

RESAMPLES = 10_000
TAIL = 0.975  # of the 95 % intervals
FEW = 30  # prompts, below which the bootstrap covers too little
BLOCK = 1_000_000  # numbers held at once while resampling


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Before against after. `n` pairs of `prompts_compared` prompts had a score on both sides; NaN where n is 0.

    An interval is (NaN, NaN) with fewer than two decided prompts: they allow no statement about other prompts.
    """

    n: int
    prompts_compared: int
    wins: int
    losses: int
    tied: int
    win_rate: float
    win_rate_ci: Interval
    mean_before: float
    mean_after: float
    mean_change: float
    mean_change_ci: Interval


def outcomes(before: ArrayLike, after: ArrayLike, *, margin: float = 0.0) -> Array:
    """1 where `after` wins, 0 where it loses, 0.5 where |after - before| <= margin, NaN where either is not finite."""
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    change = new - old
    # Scorers give float32, in which 0.72 and 0.70 differ by 0.02000004: the margin itself counts as a tie.
    rounding = 4 * np.finfo(np.float32).eps * np.maximum(np.abs(old), np.abs(new)) if margin else 0.0
    out = np.where(np.abs(change) <= margin + rounding, 0.5, (change > 0).astype(np.float64))
    return np.where(np.isfinite(change), out, np.nan)


def compare(
    before: ArrayLike,
    after: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    margin: float = 0.0,
    ties: Ties = "half",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare paired scores [N]; higher is better.

    Args:
        before, after: scores of the same prompts and seeds; pairs that are not finite on both sides are left out.
        clusters: which prompt each pair belongs to, numbers or texts [N] (default: each its own).
        margin: differences up to this are ties.
        ties: "half" counts a tie as half a win, "drop" leaves ties out of the win rate (never out of the means).
        resamples, seed: of the bootstrap.

    Raises:
        UserError: lengths that differ, a negative margin, an unknown policy.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    groups = np.arange(len(old)) if clusters is None else np.asarray(clusters)
    if not old.shape == new.shape == groups.shape or old.ndim != 1:
        raise UserError(f"paired scores: lengths differ: before {old.shape}, after {new.shape}, prompts {groups.shape}")
    check_policy(margin, ties)
    result = outcomes(old, new, margin=margin)
    valid = np.isfinite(result)
    old, new, groups, result = old[valid], new[valid], groups[valid], result[valid]
    decided = np.ones_like(result) if ties == "half" else (result != 0.5).astype(np.float64)
    return Comparison(
        n=len(old),
        prompts_compared=len(np.unique(groups)),
        wins=int((result == 1).sum()),
        losses=int((result == 0).sum()),
        tied=int((result == 0.5).sum()),
        win_rate=_ratio((result * decided).sum(), decided.sum()),
        win_rate_ci=interval(groups, result * decided, decided, resamples, seed, share=True),
        mean_before=_ratio(old.sum(), len(old)),
        mean_after=_ratio(new.sum(), len(old)),
        mean_change=_ratio((new - old).sum(), len(old)),
        mean_change_ci=interval(groups, new - old, np.ones_like(old), resamples, seed),
    )


def check_policy(margin: float, ties: str) -> None:
    """Raise UserError for a tie margin or tie policy that cannot be used."""
    if not (isinstance(margin, int | float) and math.isfinite(margin) and margin >= 0):
        raise UserError(f"tie_margin must be a number of at least 0, found {margin!r}")
    if ties not in ("half", "drop"):
        raise UserError(f"ties must be 'half' or 'drop', found {ties!r}")


def interval(
    groups: NDArray,
    numerator: Array,
    denominator: Array,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    share: bool = False,
) -> Interval:
    """95 % interval of sum(numerator) / sum(denominator) over other groups; `share`: of values in [0, 1].

    The percentile bootstrap over whole groups. With fewer than FEW groups, Student's interval of the mean instead, and
    of a share Wilson's (1927) with the number of independent values that have the variance between groups. Where a
    share is the same in all n groups, another one may still appear: in a share of z² / (n + z²) at most, as for Wilson.
    (NaN, NaN) with fewer than two groups whose denominator is not 0.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = [np.bincount(index, weights) for weights in (numerator, denominator)]  # of each group
    top, bottom = (values[sums[1] > 0] for values in sums)
    if (count := len(bottom)) < 2:
        return (math.nan, math.nan)
    mean, normal, student = top.sum() / bottom.sum(), norm.ppf(TAIL), t.ppf(TAIL, count - 1)
    if share and np.ptp(top / bottom) == 0:
        unseen = normal**2 / (count + normal**2)
        return (float(mean * (1 - unseen)), float(mean + (1 - mean) * unseen))
    variance = count / (count - 1) * ((top - mean * bottom) ** 2).sum() / bottom.sum() ** 2
    if count < FEW and share:
        return _wilson(mean, min(bottom.sum(), mean * (1 - mean) / variance), student)
    if count < FEW:
        return (float(mean - student * variance**0.5), float(mean + student * variance**0.5))

    def ratio(top: Array, bottom: Array, axis: int) -> Array:
        return np.divide(top.sum(axis), bottom.sum(axis))  # of FEW that count, a draw has none in one of e^FEW cases

    drawn = bootstrap(
        sums, ratio, paired=True, vectorized=True, n_resamples=resamples, method="percentile",
        batch=max(1, BLOCK // len(sums[0])), rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = np.quantile(drawn.bootstrap_distribution, [1 - TAIL, TAIL])
    return (float(low), float(high))


def _wilson(share: float, count: float, quantile: float) -> Interval:
    """The interval of a share among so many independent values."""
    spread = quantile**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = quantile * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return (float(middle - half), float(middle + half))


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else math.nan
