"""Supervised fine-tuning on the winners: the denoising loss on the best candidate of each group.

    loss = err_w                                                     (DDPM's simple loss, arXiv 2006.11239, eq. 14)

The baseline of every preference method, and the first stage of some.
"""

from __future__ import annotations

from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.noising import Reduction, random_noise
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Objective, Requirements
from t2i_align.utils.settings import settings


@settings
class SFT(Objective):
    """Denoising on the preferred candidate alone; asks no reference. Ties and disliked samples are left out."""

    reduction: Reduction = "mean"

    name = "sft"
    paper = "arXiv 2006.11239"
    config = "sd15_sft.yaml"
    needs = Requirements(candidates=1, ties=False, likes_only=True)

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        err_w = random_noise(batch.take([0]), rng).errors(policy, self.reduction)[:, 0]
        return err_w, {"error/chosen": err_w.detach()}
