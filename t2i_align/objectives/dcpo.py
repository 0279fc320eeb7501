"""DCPO: Diffusion-DPO with a caption of its own for each candidate (arXiv 2502.06023).

    h = -1/2 beta [ s(x_w, z_w) - s(x_l, z_l) ],    s = err - ref_err

The three variants differ in the data only; `t2i-align caption` writes the captions:

    c   z_w, z_l: a captioner's descriptions of the two images
    p   z_w: the prompt; z_l: the prompt with something changed
    h   z_w: the winner's description; z_l: the loser's description with something changed

A margin can be bought by the text alone where z_l is merely a bad caption: watch the error differences.
"""

from __future__ import annotations

from t2i_align.objectives.base import Requirements
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.utils.settings import Positive, settings


@settings
class DCPO(DiffusionDPO):
    """DCPO on pairs with two captions. The released runs use beta 500 on SD2.1."""

    beta: Positive = 500.0

    name = "dcpo"
    paper = "arXiv 2502.06023"
    config = "sd21_dcpo.yaml"
    needs = Requirements(candidates=2, ties=False, reference=True, columns=("captions",))
