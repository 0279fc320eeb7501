"""What a user writes, for `mypy --strict`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

import pipelines
import reward_scorers
from t2i_align import align, batches, evaluate, generate, load_pipeline, load_plugin, losses
from t2i_align.objectives import OBJECTIVES, DiffusionDPO, Objective, Pairwise, Requirements, register
from t2i_align.utils.settings import settings


@register
@settings
class Mine(Pairwise):
    name = "mine"
    needs = Requirements(candidates=2, ties=False)

    def logit(self, err_w: Tensor, err_l: Tensor, ref_err_w: Tensor, ref_err_l: Tensor, beta: float | Tensor) -> Tensor:
        return losses.dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta)


def main(rows: list[dict[str, object]]) -> float:
    load_plugin("zimage.py")
    pipeline: pipelines.TrainablePipeline = load_pipeline("testbed:sd")
    objective: Objective = Mine(beta=3.0)
    run = align(objective=objective, model=pipeline, data=rows, output_dir="runs/mine", on_step=print)
    loss: float = run.metrics["loss"]
    weights: Path = run.weights
    result = evaluate(base="testbed:sd", aligned=weights, prompts=["a fox"], scorers=["oracle"], out="runs/evaluation")
    images = generate(pipeline, ["a fox"], out=None)
    scores: Tensor = reward_scorers.build("oracle").score_images(images, ["a fox"])
    for batch, rng in batches(rows, pipeline, needs=DiffusionDPO.needs):
        print(batch.latents.shape, rng.timesteps(), pipelines.check(pipeline).ok, OBJECTIVES["sft"])
    return loss + result.win_rate + float(scores.mean())
