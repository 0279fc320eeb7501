"""Scores of a prompt's candidates against their labels: losses and accuracy of preference models.

A loss is a function of scores r [k] and labels [k] of one group, higher is better, equal is a tie, and returns a
scalar; 0 for a group from which it learns nothing (all ties, for losses without ties).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_align.data.spec import normalise
from t2i_align.evaluation.result import shown
from t2i_align.evaluation.stats import compare

THETA = 5.0  # of BTT: how many times as likely a win has to be before it is no tie (arXiv 2501.13918)


def winner_gaps(r: Tensor, labels: Tensor) -> Tensor:
    """r_i - r_j of all pairs with label_i > label_j, [pairs]."""
    return (r[:, None] - r[None, :])[labels[:, None] > labels[None, :]]


def pickscore(r: Tensor, labels: Tensor) -> Tensor:
    """KL(p ‖ softmax(r)), p uniform over the best: a tie's ½, ½ included (PickScore, arXiv 2305.01569, eq. 2).

    Cross-entropy less the entropy of p, so that it is 0 at its optimum for ties as well.
    """
    best = (labels == labels.max()).float()
    p = best / best.sum()
    return -(p * r.log_softmax(-1)).sum() - best.sum().log()


def hpsv2(r: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(r)_best, the mean where several are best (HPSv2, arXiv 2306.09341); 0 where all are."""
    best = labels == labels.max()
    return r.sum() * 0 if bool(best.all()) else -r.log_softmax(-1)[best].mean()


def imagereward(r: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log σ(r_i - r_j) over pairs with label_i > label_j (ImageReward, arXiv 2304.05977, eq. 1)."""
    gaps = winner_gaps(r, labels)
    return -F.logsigmoid(gaps).mean() if len(gaps) else r.sum() * 0


def btt(r: Tensor, labels: Tensor) -> Tensor:
    """Bradley-Terry with ties (VideoReward, arXiv 2501.13918): the mean over all pairs, with Δ = r_i - r_j.

    i is better: -log σ(Δ - log θ); tie: -log σ(Δ - log θ) - log σ(-Δ - log θ) - log(θ² - 1).
    """
    first, second = torch.triu_indices(len(r), len(r), offset=1)
    gap, order = r[first] - r[second], torch.sign(labels[first] - labels[second])
    log_theta = math.log(THETA)
    won = -F.logsigmoid(order * gap - log_theta)
    tied = -F.logsigmoid(gap - log_theta) - F.logsigmoid(-gap - log_theta) - math.log(THETA**2 - 1)
    return torch.where(order == 0, tied, won).mean()


LOSSES = {loss.__name__: loss for loss in (pickscore, hpsv2, imagereward, btt)}
LEARN_FROM_TIES = ("pickscore", "btt")


def by_group(scores: Tensor, labels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Scores [N] of all candidates one after another to [k] per group, as `labels` are."""
    return scores.split([len(label) for label in labels])


def per_group(name: str, scores: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The loss of each group, [B]; scores [N] are of all candidates one after another, labels [k] one per group."""
    return torch.stack([LOSSES[name](r, label) for r, label in zip(by_group(scores, labels), labels, strict=True)])


def right(scores: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The share of a group's pairs with a winner that the scores order as the labels do, [B]; a draw is half right.

    NaN for a group without a winner.
    """
    gaps = map(winner_gaps, by_group(scores, labels), labels)
    return torch.stack([((gap > 0).float() + 0.5 * (gap == 0).float()).mean() for gap in gaps])


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many pairs with a winner are ordered rightly, draws half, with a 95 % interval over prompts."""

    pairs: int
    prompts: int
    accuracy: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        return f"{shown(self.accuracy, self.interval).strip()} of {self.pairs} pairs"


def measure(scores: Sequence[Tensor], labels: Sequence[Tensor], prompts: Sequence[str]) -> Accuracy:
    """Pair accuracy of groups: scores [k], labels [k] and the prompt of each."""
    gaps = [winner_gaps(r.double(), label) for r, label in zip(scores, labels, strict=True)]
    won = torch.cat(gaps).cpu().numpy()
    clusters = np.repeat([normalise(prompt) for prompt in prompts], [len(gap) for gap in gaps])
    result = compare(np.zeros(len(won)), won, clusters)
    return Accuracy(
        pairs=result.n, prompts=result.prompts_compared, accuracy=result.win_rate, interval=result.win_rate_ci
    )
