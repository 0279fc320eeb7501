"""Every objective on the genuine denoisers of SDXL, SD3 (flow) and Wan (flow, clips): steps, gradients, rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pipelines
from pipelines import TrainablePipeline
from t2i_align.config import TrainConfig
from t2i_align.data.batch import Batch
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives import OBJECTIVES
from t2i_align.objectives.base import DataStats
from t2i_align.training.reference import build_reference
from tests import tiny
from tests.objectives.toy import DEPENDS_ON_THE_BATCH, SHORT, as_required, rows_of

BUILDERS = {"sdxl": tiny.tiny_sdxl, "sd3": tiny.tiny_sd3, "wan": tiny.tiny_wan}
GROUPS, CANDIDATES = 2, 3


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainablePipeline]:
    loaded = {}
    for name, build in BUILDERS.items():
        torch.manual_seed(0)
        pipeline = loaded[name] = pipelines.load(build(tmp_path_factory.mktemp("models") / name))
        pipeline.add_lora(rank=2, alpha=4.0, dropout=0.0, targets="attention")
        for parameter in pipeline.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return loaded


def batch_for(pipeline: TrainablePipeline) -> Batch:
    """Groups with all that an objective can require: scores, captions, a wrong caption, the empty prompt."""
    height, width = pipeline.default_size
    shape = (pipeline.default_frames, 3, height, width) if pipeline.video else (3, height, width)
    torch.manual_seed(1)
    latents = pipeline.encode_pixels(torch.rand(GROUPS * CANDIDATES, *shape)).unflatten(0, (GROUPS, CANDIDATES))
    frames = latents.shape[3] if pipeline.video else 1
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.6, 0.4]])
    captions = pipeline.encode_prompts([f"caption {i}" for i in range(GROUPS * CANDIDATES)])
    return Batch(
        keys=tuple(f"0/{i}" for i in range(GROUPS)),
        latents=latents,
        scores=scores,
        conditioning=pipeline.encode_prompts([f"prompt {i}" for i in range(GROUPS)]),
        columns={
            "captions": {name: tensor.unflatten(0, (GROUPS, CANDIDATES)) for name, tensor in captions.items()},
            "negative_caption": pipeline.encode_prompts([f"wrong {i}" for i in range(GROUPS)]),
            "segment_scores": scores[..., None].expand(-1, -1, frames),
            "segment_seconds": (1.0,) * GROUPS,
        },
        empty=pipeline.encode_prompts([""]),
    )


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_step_on_the_genuine_denoiser(name: str, family: str, families: dict[str, TrainablePipeline]) -> None:
    """One loss per group, finite, with a gradient for the LoRA and none for anything else; where a loss is a group's
    own, a batch is its groups one at a time."""
    pipeline = families[family]
    objective = OBJECTIVES[name](**SHORT.get(name, {})).fit_to_data(DataStats(score_range=(0.1, 0.9)))
    reference = build_reference(TrainConfig(), pipeline, needed=objective.needs.reference)
    batch = batch_for(pipeline)

    def step(rows: slice) -> Tensor:
        part = rows_of(as_required(batch, objective), rows)
        rng = SampleRNG(0, part.keys, pipeline.process, "uniform", torch.device("cpu"))
        loss: Tensor = objective.step(pipeline.predict, reference, part, rng)[0]
        return loss

    parameters = list(pipeline.trainable_parameters())
    loss = step(slice(0, GROUPS))
    assert loss.shape == (GROUPS,) and loss.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients) > len(parameters) / 2
    if name not in DEPENDS_ON_THE_BATCH:
        apart = torch.cat([step(slice(i, i + 1)) for i in range(GROUPS)])
        torch.testing.assert_close(loss, apart, rtol=2e-3, atol=2e-3)
