"""SmPO: InPO with each pair weighted by how sure a reward model is of its order (arXiv 2506.02698).

    h = -1/2 beta gamma (2 p - 1) [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    p = softmax(r_w, r_l)_w

with r the scores scaled to [0, 1] over the dataset, so that 2 p - 1 = tanh((r_w - r_l) / 2): 0 for a tie, which
teaches nothing, and at most 0.46.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from t2i_align.data.batch import Batch
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats, Requirements
from t2i_align.objectives.inpo import InPO
from t2i_align.utils.settings import Count, Float, Positive, Whole, settings


def certainty(score_w: Tensor, score_l: Tensor, *, score_min: float, score_max: float) -> Tensor:
    """2 p - 1 of each pair, [B] in (-1, 1)."""
    return torch.tanh((score_w - score_l) / (score_max - score_min) / 2)


@settings
class SmPO(InPO):
    """SmPO on pairs with scores. The paper uses beta 2000 (SD1.5, from an SFT model) and 5000 (SDXL), as InPO.

    gamma: how strongly a sure pair counts; the paper's best.
    score_min, score_max: the range that scores are scaled by; null takes the data's own. The paper has PickScore's
        cosines on Pick-a-Pic, 0.11544 to 0.28202.
    """

    levels: Count = 5
    renoise: Whole = 1
    gamma: Positive = 10.0
    score_min: Float | None = None
    score_max: Float | None = None

    name = "smpo"
    paper = "arXiv 2506.02698"
    config = "sd15_smpo.yaml"
    needs = Requirements(candidates=2, ties=False, reference=True, columns=("scores",), uneven=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_min is not None and self.score_max is not None and not self.score_min < self.score_max:
            raise UserError(
                "objective.score_min must be less than objective.score_max, "
                f"found {self.score_min!r} and {self.score_max!r}"
            )

    def strength(self, batch: Batch) -> Tensor:
        if self.score_min is None or self.score_max is None:
            raise UserError("objective.score_min and objective.score_max must be set, or fitted to the data")
        best, worst = batch.scores[:, 0], batch.scores[:, -1]
        return self.gamma * certainty(best, worst, score_min=self.score_min, score_max=self.score_max)

    def fit_to_data(self, facts: DataStats) -> Self:
        least, greatest = facts.score_range
        return replace(
            self,
            score_min=least if self.score_min is None else self.score_min,
            score_max=greatest if self.score_max is None else self.score_max,
        )
