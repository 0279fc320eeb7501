"""One number per candidate, higher is better: several scorers' scores combined, or the name of a winner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from t2i_align.data.schema import Names, Row, finite
from t2i_align.errors import UserError, shown

TIE = ("tie", "draw", "equal", "both", "same", "0.5")
NEITHER = ("neither", "both bad", "both_bad")  # a tie as well, between images that are both disliked


def majority(scores: np.ndarray, margins: Sequence[float] | None = None) -> np.ndarray:
    """The share of comparisons that a candidate wins, [k] in [0, 1].

    phi_i = wins_i / (n (k - 1)) over n scorers and the k - 1 other candidates (Syn-Pic, arXiv 2410.18013); for a pair
    it is the share of votes. A comparison within a scorer's margin is half a win for both, so a scorer that cannot
    tell the candidates apart changes no order. Candidates can tie; the paper does not mention ties.

    Args:
        scores: [n, k], each scorer on its own scale.
        margins: differences up to this size are no preference, one per scorer (default: 0).
    """
    k = _checked(scores).shape[1]
    if k == 1:
        return np.full(1, 0.5)
    return (shares(scores, margins).sum(1) - 0.5) / (k - 1)  # exclude self-comparison


def shares(scores: np.ndarray, margins: Sequence[float] | None = None) -> np.ndarray:
    """The share of scorers that prefer candidate i to j, [k, k]; a comparison within a margin is half for each."""
    scores = _checked(scores)
    margin = np.zeros(len(scores)) if margins is None else np.asarray(margins, float)
    gap = scores[:, :, None] - scores[:, None, :]
    share: np.ndarray = np.where(np.abs(gap) <= margin[:, None, None], 0.5, gap > 0).mean(0)
    return share


def mean_rank(scores: np.ndarray, margins: Sequence[float] | None = None) -> np.ndarray:
    """Minus the mean rank over scorers, 1 being the best and ties sharing their ranks, [k].

    Ignores margins; without them it orders candidates as `majority` does.
    """
    return -rankdata(-_checked(scores), axis=1).mean(0)


def total(scores: np.ndarray, margins: Sequence[float] | None = None) -> np.ndarray:
    """The sum over scorers, [k]. The scorer with the widest scale decides: for scorers of one scale."""
    return _checked(scores).sum(0)


RULES: dict[str, Callable[[np.ndarray, Sequence[float] | None], np.ndarray]] = {
    "majority": majority,
    "mean_rank": mean_rank,
    "sum": total,
}


def won(row: Row, name: str, names: Names, candidates: Sequence[Any]) -> tuple[float, ...]:
    """The winner that a row names in its column `name` is 1, the others 0; `names` are the candidates' columns.

    Raises:
        ValueError: none of them.
        UserError: a place that only counting from 1 gives, which would turn all other rows round.
    """
    value = row.values.get(name)
    winner = str(value).strip()
    if winner.lower() in TIE:
        return (0.5,) * len(candidates)
    if winner.lower() in NEITHER:
        return (0.0,) * len(candidates)
    columns = names if isinstance(names, list) else []
    number = None if isinstance(value, bool) else finite(value)
    for place, candidate in enumerate(candidates):
        own_path = isinstance(candidate, str) and winner == candidate
        if own_path or winner in columns[place : place + 1] or number == place:
            return tuple(float(other == place) for other in range(len(candidates)))
    if number == len(candidates):
        raise UserError(
            f"{row.origin}: {name!r} is {winner}, but places count from 0 to {len(candidates) - 1}. If this source "
            "counts from 1, subtract 1, or name columns or paths."
        )
    expected = " or ".join([*columns, f"0 to {len(candidates) - 1}", TIE[0], NEITHER[0]])
    raise ValueError(f"{name!r} must be {expected}, found {shown(value)}")


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or 0 in scores.shape or not np.isfinite(scores).all():
        raise ValueError(f"scores: expected finite numbers [scorers, candidates], found {scores.tolist()}")
    return scores
