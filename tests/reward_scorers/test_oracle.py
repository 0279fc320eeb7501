"""The oracle as a scorer: its numbers, its parts, the prompts it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reward_scorers import ScorerError
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers
from t2i_align.testbed.captions import describe, write
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import render, sample_scene

PARTS = {"faithfulness", "quality", "strict", "colour", "shape", "size", "relation", "count", "background"}


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(12)]
    pixels = torch.stack([torch.from_numpy(np.asarray(render(scene), dtype=np.float32)) for scene in scenes])
    if pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return pixels, [write(describe(scene, rng), rng) for scene in scenes]


def test_score_and_parts_are_the_oracles(world: tuple[torch.Tensor, list[str]]) -> None:
    pixels, prompts = world
    scorer = build_scorers("oracle")[0]
    verdict = Oracle().judge(pixels, prompts)
    total, parts = scorer.judge(pixels, prompts)
    np.testing.assert_allclose(total.numpy(), verdict.reward, rtol=1e-6)
    np.testing.assert_allclose(scorer.score(pixels, prompts).numpy(), verdict.reward, rtol=1e-6)
    assert parts.keys() == PARTS and total.dtype == torch.float32
    np.testing.assert_allclose(parts["quality"].numpy(), verdict.quality, rtol=1e-6)
    np.testing.assert_allclose(parts["relation"].numpy(), verdict.attributes["relation"], rtol=1e-6)
    assert parts["relation"].isnan().any() and not parts["relation"].isnan().all()
    assert (scorer.name, scorer.version, scorer.differentiable) == ("oracle", Oracle.version, False)


def test_another_prompt_scores_lower(world: tuple[torch.Tensor, list[str]]) -> None:
    pixels, prompts = world
    scorer = build_scorers(["oracle"])[0]
    assert scorer.score(pixels, prompts).mean() > scorer.score(pixels, [*prompts[1:], prompts[0]]).mean() + 0.1


def test_foreign_prompts_and_arguments_are_named() -> None:
    scorer = build_scorers(["oracle"])[0]
    with pytest.raises(ScorerError, match=r"prompts\[1\].*a photo of a cat"):
        scorer.check_prompts(["a red circle", "a photo of a cat"])
    with pytest.raises(ScorerError, match=r"prompts\[0\].*a photo of a cat"):
        scorer.score(torch.rand(1, 3, 64, 64), ["a photo of a cat"])
    with pytest.raises(ScorerError, match="expected square images, found 65 x 64"):
        scorer.score(torch.rand(1, 3, 64, 65), ["a red circle"])
    with pytest.raises(UserError, match="takes no argument"):
        build_scorers(["oracle:v2"])
