"""Losses of preference models: scores of a prompt's candidates against their labels.

Each is a function of scores r [k] and labels [k] of one group, higher is better, equal is a tie; and returns a scalar.
A group that teaches a loss nothing (all ties, for those that know no ties) gives 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_align.errors import unknown

THETA = 5.0  # of BTT: how many times as likely a win has to be before it is no tie (arXiv 2501.13918)


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
    better = labels[:, None] > labels[None, :]
    gaps = (r[:, None] - r[None, :])[better]
    return -F.logsigmoid(gaps).mean() if len(gaps) else r.sum() * 0


def btt(r: Tensor, labels: Tensor) -> Tensor:
    """Bradley-Terry with ties (VideoReward, arXiv 2501.13918): the mean over all pairs, with Δ = r_i - r_j.

    i is better: -log σ(Δ - log θ); tie: -log σ(Δ - log θ) - log σ(-Δ - log θ) - log(θ² - 1).
    """
    first, second = torch.triu_indices(len(r), len(r), offset=1)
    gap, order = r[first] - r[second], torch.sign(labels[first] - labels[second])
    log_theta = torch.tensor(THETA).log().item()
    won = -F.logsigmoid(order * gap - log_theta)
    tied = -F.logsigmoid(gap - log_theta) - F.logsigmoid(-gap - log_theta) - torch.tensor(THETA**2 - 1).log().item()
    return torch.where(order == 0, tied, won).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "btt": btt,
}
LEARN_FROM_TIES = ("pickscore", "btt")


def get(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of this name. Raises UserError where there is none."""
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]


def per_group(name: str, scores: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The loss of each group, [B]; scores [N] are of all candidates one after another, labels [k] one per group."""
    loss, parts = get(name), scores.split([len(label) for label in labels])
    return torch.stack([loss(part, label) for part, label in zip(parts, labels, strict=True)])


def right(scores: Tensor, labels: Sequence[Tensor]) -> Tensor:
    """The share of a group's pairs with a winner that the scores order as the labels do, [B]; a draw is half right.

    NaN for a group without a winner.
    """
    shares = []
    for r, label in zip(scores.split([len(label) for label in labels]), labels, strict=True):
        better = label[:, None] > label[None, :]
        gap = (r[:, None] - r[None, :])[better]
        shares.append(((gap > 0).float() + 0.5 * (gap == 0).float()).mean())  # the mean of none is NaN
    return torch.stack(shares)
