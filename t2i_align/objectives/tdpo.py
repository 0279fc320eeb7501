"""TDPO and TKTO: preferences between two texts for one image, so that no images are compared (arXiv 2509.25771).

    TDPO   h = -1/2 beta [ s(x, c+) - min( s(x, c-), limit ) ],    loss = -log sigmoid(h)
    TKTO   (x, c+) is a desirable sample and (x, c-) an undesirable one of Diffusion-KTO

c+ is the prompt, c- a text that does not fit the image; both see the same noise. The paper clips the negative term
and does not print how: the form above, which stops rewarding the unlearning of c- beyond `limit`, is our reading.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.base import Metrics, Requirements
from t2i_align.objectives.diffusion_dpo import DiffusionDPO, dpo_logit
from t2i_align.objectives.kto import DiffusionKTO
from t2i_align.utils.settings import Positive, settings

NEEDS = Requirements(candidates=1, ties=True, likes_only=True, reference=True, columns=("negative_caption",))


def one_image_two_texts(batch: Batch) -> Batch:
    """The best candidate twice, under the prompt and under the negative caption."""
    assert batch.negative_caption is not None, "checked by the objective's needs"
    negative = batch.negative_caption
    return replace(
        batch.take([0, 0]),
        scores=torch.stack([torch.ones_like(batch.scores[:, 0]), torch.zeros_like(batch.scores[:, 0])], dim=1),
        columns={
            "captions": {
                name: torch.stack([tensor, negative[name]], dim=1) for name, tensor in batch.conditioning.items()
            }
        },
    )


def tdpo_logit(
    err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, *, beta: float | Tensor, limit: float
) -> Tensor:
    """h, [B], of errors under the prompt (w) and under the negative caption (l)."""
    return dpo_logit(err_w, torch.minimum(err_l, ref_err_l + limit), ref_err_w, ref_err_l, beta=beta)


@settings
class TDPO(DiffusionDPO):
    """TDPO on single images. limit: how far the error under c- may rise above the reference's and still count."""

    beta: Positive = 2000.0
    limit: Positive = 0.01

    name = "tdpo"
    paper = "arXiv 2509.25771"
    config = "sd15_tdpo.yaml"
    needs = NEEDS

    def paired(self, batch: Batch) -> Batch:
        return one_image_two_texts(batch)

    def logit(self, err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, beta: float | Tensor) -> Tensor:
        return tdpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta, limit=self.limit)


@settings
class TKTO(DiffusionKTO):
    """TKTO on single images: Diffusion-KTO's utility on two texts."""

    name = "tkto"
    paper = "arXiv 2509.25771"
    config = "sd15_tkto.yaml"
    needs = NEEDS

    def step(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> tuple[Tensor, Metrics]:
        return super().step(policy, reference, one_image_two_texts(batch), rng)

    def errors_key(self) -> str | None:
        return f"{super().errors_key()}, paired by TDPO"
