"""The testbed's tiny CLIP: what it starts from and learns from, its loss, and that scorers read what is saved."""

import math

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

import reward_scorers
from t2i_align.testbed import base_path
from t2i_align.testbed.captions import draw_image, draw_wrong, write
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.scenes import Object, Scene
from t2i_align.testbed.world import IMAGES, draw_statement, split_of
from tools.testbed.__main__ import main
from tools.testbed.clip import build_clip, contrastive_loss, patch_labels, to_input
from tools.testbed.networks import build_tokenizer, to_ids


def test_the_text_tower_starts_as_the_bundled_encoder():
    text = CLIPTextModel.from_pretrained(base_path("sd"), subfolder="text_encoder", dtype=torch.float32).eval()
    ids = to_ids(build_tokenizer(), ["a red circle above a blue square", "three green crosses"])
    with torch.no_grad():
        ours = build_clip().eval().text_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours, text(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_statements_are_of_the_train_split_and_wrong_images_are_wrong():
    rng = np.random.default_rng(0)
    statements = [draw_statement(IMAGES, rng) for _ in range(20)]
    assert {split_of(statement) for statement in statements} == {"train"}
    texts = [write(statement, rng) for statement in statements]
    for stated, strict in ((statements, 1), ([draw_wrong(statement, rng) for statement in statements], 0)):
        pixels = torch.from_numpy(np.stack([draw_image(s, rng) for s in stated])).permute(0, 3, 1, 2)
        assert (Oracle().judge(pixels, texts).strict == strict).all()


def test_patch_labels_name_what_is_drawn_there():
    objects = (Object("cross", "blue", "large", 12.0, 12.0, 10.0), Object("circle", "red", "small", 50.0, 44.0, 6.0))
    labels = patch_labels(Scene("pair", "white", objects))
    assert labels.shape == (3, 8, 8) and set(labels[0].flatten()) == {0, 1, 6} and set(labels[1].flatten()) == {0, 1, 5}
    assert labels[:, 1, 1].tolist() == [6, 5, 2]  # the patch from (8, 8) to (16, 16)
    assert labels[:, 5, 6].tolist() == [1, 1, 1] and labels[0, 7, 7] == 0


def test_loss_of_an_uninformative_model():
    """With equal features: half of log 2B over captions' images and log B over images' captions."""
    model = build_clip().eval()
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    rng = np.random.default_rng(0)
    pixels = to_input([draw_image(draw_statement(IMAGES, rng), rng) for _ in range(8)])
    ids = to_ids(build_tokenizer(), ["a red circle"] * 4)
    assert contrastive_loss(model, pixels, ids).item() == pytest.approx((math.log(8) + math.log(4)) / 2, abs=1e-5)


def test_the_command_saves_a_reproducible_scorer(tmp_path):
    pixels, scores = torch.rand(2, 3, 64, 64), []
    for name in ("one", "two"):
        main(["clip", "--out", str(tmp_path / name), *"--look 2 --steps 2 --batch 4 --threads 1".split()])
        scorer = reward_scorers.build(f"hf-clip:{tmp_path / name}")
        scores.append(scorer.score(pixels, ["a red circle", "a blue square"]))
    assert torch.equal(*scores) and scores[0].std() > 0
