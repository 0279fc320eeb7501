"""A vision-language model as judge: equal to its own forward, in batches, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import reward_scorers
from reward_scorers import ScorerError
from reward_scorers.vlm import VLMScorer, inputs_of
from tests.labeling.test_models import blip, llava
from tests.reward_scorers.small import write_hf_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return llava(tmp_path_factory.mktemp("vlm") / "llava")


@pytest.fixture(scope="module")
def judge(folder: Path) -> VLMScorer:
    scorer = reward_scorers.build(f"vlm:{folder}")
    assert isinstance(scorer, VLMScorer)
    return scorer


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_score_is_the_chance_of_yes_at_the_first_token(folder: Path, judge: VLMScorer) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image, prompt = images(1)[0], "two cats"
    inputs = inputs_of(judge.processor, [image], [judge.question.replace("{prompt}", prompt)])
    with torch.no_grad():
        chances = model(**inputs).logits[0, -1].softmax(-1)
    total, parts = judge.judge([image], [prompt])
    yes, no = chances[judge.yes].sum(), chances[judge.no].sum()
    torch.testing.assert_close(total[0], yes, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(parts["log_odds"][0], (yes / no).log(), atol=1e-4, rtol=1e-4)
    assert 0 < total.item() < 1 and not set(judge.yes) & set(judge.no)


@pytest.mark.parametrize("make", [llava, blip])
def test_a_batch_is_what_single_images_are(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = VLMScorer(str(make(tmp_path / "model")))
    pils, prompts = images(3), ["a", "a much longer prompt than that", "b c"]
    single = torch.cat([scorer.score_images([i], [p]) for i, p in zip(pils, prompts, strict=True)])
    torch.testing.assert_close(scorer.score_images(pils, prompts), single, atol=1e-6, rtol=1e-4)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in pils])
    torch.testing.assert_close(scorer.score(pixels, prompts), single, atol=1e-6, rtol=1e-4)
    assert not scorer.differentiable


def test_what_cannot_judge_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="needs a model"):
        reward_scorers.build("vlm")
    with pytest.raises(ScorerError, match=r"needs \{prompt\} in it"):
        VLMScorer(str(folder), question="Is it good?")
    with pytest.raises(ScorerError, match="no such folder"):
        reward_scorers.build("vlm:/no/such/folder")
    with pytest.raises(ScorerError, match="could not be loaded"):
        reward_scorers.build(f"vlm:{write_hf_clip(tmp_path / 'clip')}")
