"""RankDPO: every pair of a ranked list, weighted by what an exchange would cost in DCG (arXiv 2410.18013).

    loss = - sum over i better than j of  D_ij log sigmoid( -1/2 beta (s_i - s_j) ),    s = err - ref_err
    D_ij = |G_i - G_j| |1 / log(1 + r_i) - 1 / log(1 + r_j)|,    G = 2^phi - 1,    r the rank by the labels, 1 the best

phi is a candidate's average win rate in [0, 1]: with `gain: scores` the data's own scores (as synthesis writes them),
with `gain: wins` the share of the other candidates it beats, a tie counting half. The paper prints beta without the
factor 1/2, on sums of squares; here it has the project's convention. D is at most about 0.8, so `normalise` divides by
the sum of D.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_align.diffusion.noising import NoiseSharing
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats
from t2i_align.objectives.listwise import Listwise
from t2i_align.objectives.pairwise import wins
from t2i_align.utils.settings import Bool, settings


def win_rates(scores: Tensor) -> Tensor:
    """Share of the other candidates that each beats, [B, k] in [0, 1]; ties count half."""
    beaten = wins(scores.unsqueeze(2) - scores.unsqueeze(1)).sum(2) - 0.5  # less the half win over itself
    return beaten / (scores.shape[1] - 1)


def dcg_weights(scores: Tensor, phi: Tensor) -> Tensor:
    """D_ij where i is better than j, else 0; [B, k, k]. Tied candidates share the mean of their ranks."""
    better = (scores.unsqueeze(1) > scores.unsqueeze(2)).to(phi.dtype).sum(2)
    tied = (scores.unsqueeze(1) == scores.unsqueeze(2)).to(phi.dtype).sum(2)
    rank = better + (tied + 1) / 2
    gain, discount = torch.exp2(phi) - 1, 1 / torch.log1p(rank)
    weights = (gain.unsqueeze(2) - gain.unsqueeze(1)).abs() * (discount.unsqueeze(2) - discount.unsqueeze(1)).abs()
    return torch.where(scores.unsqueeze(2) > scores.unsqueeze(1), weights, 0)


def rankdpo_loss(s: Tensor, weights: Tensor, *, beta: float, normalise: bool) -> Tensor:
    """Loss of each list [B] from error differences s [B, k] and pair weights [B, k, k]."""
    h = -0.5 * beta * (s.unsqueeze(2) - s.unsqueeze(1))
    total = -(weights * F.logsigmoid(h)).sum((1, 2))
    return total / weights.sum((1, 2)).clamp_min(torch.finfo(total.dtype).tiny) if normalise else total


@settings
class RankDPO(Listwise):
    """RankDPO on groups of k candidates; for k = 2 and `normalise` it is Diffusion-DPO with independent noise."""

    gain: Literal["wins", "scores"] = "wins"
    normalise: Bool = True
    noise: NoiseSharing = "independent"

    name = "rankdpo"
    paper = "arXiv 2410.18013"
    config = "sd15_rankdpo.yaml"

    def list_loss(self, s: Tensor, scores: Tensor) -> Tensor:
        weights = dcg_weights(scores, win_rates(scores) if self.gain == "wins" else scores).to(s.dtype)
        return rankdpo_loss(s, weights, beta=self.beta, normalise=self.normalise)

    def fit_to_data(self, facts: DataStats) -> Self:
        least, greatest = facts.score_range
        if self.gain == "scores" and not 0 <= least <= greatest <= 1:
            raise UserError(
                "objective.gain 'scores' needs scores in [0, 1] (average win rates), "
                f"found {least:g} to {greatest:g}; use gain 'wins'"
            )
        return self
