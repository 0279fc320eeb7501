"""Win rates and mean changes of paired scores, with bootstrap intervals over prompts.

A pair is one prompt and seed, scored before and after. The interval is the percentile bootstrap (Efron 1979): whole
prompts are drawn with replacement, because several seeds of one prompt are not independent. It covers other prompts
from the same source, not other training runs. Where all pairs agree it has no width, and below some 30 prompts it is
too narrow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from t2i_align.errors import UserError

Ties = Literal["half", "drop"]
Interval = tuple[float, float]
Array = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 1_000_000  # numbers held at once while resampling


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Before against after. `n` pairs of `prompts_compared` prompts had a score on both sides; NaN where n is 0.

    An interval is (NaN, NaN) with fewer than two prompts: they allow no statement about other prompts.
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
    clusters: Sequence[int] | ArrayLike | None = None,
    *,
    margin: float = 0.0,
    ties: Ties = "half",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare paired scores [N]; higher is better.

    Args:
        before, after: scores of the same prompts and seeds; pairs that are not finite on both sides are left out.
        clusters: which prompt each pair belongs to, [N] (default: each its own).
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
        win_rate_ci=interval(groups, result * decided, decided, resamples, seed),
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
    groups: NDArray, numerator: Array, denominator: Array, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile interval of sum(numerator) / sum(denominator) when whole groups are drawn with replacement.

    (NaN, NaN) with fewer than two groups, or where the denominator is 0.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = [np.bincount(index, weights) for weights in (numerator, denominator)]  # of each group
    if len(sums[0]) < 2 or not sums[1].any():
        return (math.nan, math.nan)

    def ratio(top: Array, bottom: Array, axis: int) -> Array:
        top, bottom = top.sum(axis), bottom.sum(axis)
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)

    with warnings.catch_warnings():
        # A draw without any decided pair is NaN, which scipy's own quantile would return and warn of.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        drawn = bootstrap(
            sums, ratio, paired=True, vectorized=True, n_resamples=resamples, method="percentile",
            batch=max(1, BLOCK // len(sums[0])), rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = np.nanquantile(drawn.bootstrap_distribution, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return (float(low), float(high))


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else math.nan
