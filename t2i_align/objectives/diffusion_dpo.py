"""Diffusion-DPO: raise the winner's likelihood over the loser's, measured against a reference (arXiv 2311.12908).

    h = -1/2 beta [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    loss = -log sigmoid(h)          (eq. 14)

T and the weight omega(lambda_t) are folded into beta, as in the paper. The error is the native target's: noise for
epsilon-, v for v-prediction and flow matching (Flow-DPO, arXiv 2501.13918, which reports that the derived weight
(1 - t)^2 is worse than none).
"""

from __future__ import annotations

from t2i_align.objectives.pairwise import Pairwise
from t2i_align.utils.settings import settings


@settings
class DiffusionDPO(Pairwise):
    """Diffusion-DPO on pairs.

    beta: the paper uses 2000 (SD1.5) and 5000 (SDXL) with mean errors. diffusers' script has no factor 1/2: its
        2500 is 5000 here.
    """

    name = "diffusion_dpo"
    paper = "arXiv 2311.12908"
    config = "sd15_diffusion_dpo.yaml"
