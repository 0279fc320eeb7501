"""Diffusion-LPO: the Plackett-Luce likelihood of a whole ranked list (arXiv 2510.01540).

    loss = - 1/(m - 1) sum over j < m of [ h_j - log sum over k >= j of exp h_k ],    h_k = -1/2 beta s_k,
    s = err - ref_err

For m = 2 this is Diffusion-DPO. Candidates with equal scores are not compared with each other: the sum for j takes
those that are strictly worse, and j itself. The paper sums the terms; their mean keeps long lists from dominating.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2i_align.objectives.listwise import Listwise
from t2i_align.utils.settings import settings


def plackett_luce_loss(h: Tensor, scores: Tensor) -> Tensor:
    """Mean negative log-likelihood [B] over the candidates that beat another; h, scores: [B, k], in any order."""
    worse = scores.unsqueeze(2) > scores.unsqueeze(1)  # [B, j, k]: k is worse than j
    itself = torch.eye(h.shape[1], dtype=torch.bool, device=h.device)
    rivals = h.unsqueeze(1).expand(-1, h.shape[1], -1).masked_fill(~(worse | itself), -torch.inf)
    terms = torch.logsumexp(rivals, dim=2) - h
    return terms.sum(1) / worse.any(2).sum(1).clamp_min(1)  # a candidate that beats none has the term h_j - h_j = 0


@settings
class DiffusionLPO(Listwise):
    """Diffusion-LPO on groups of k candidates."""

    name = "lpo"
    paper = "arXiv 2510.01540"
    config = "sd15_lpo.yaml"

    def list_loss(self, s: Tensor, scores: Tensor) -> Tensor:
        return plackett_luce_loss(-0.5 * self.beta * s, scores)
