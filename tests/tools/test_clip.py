"""The testbed's tiny CLIP: it begins able to read, its loss, and that it is saved as scorers read it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

import reward_scorers
from t2i_align.testbed import base_path
from t2i_align.testbed.captions import draw_image, draw_wrong, parse, write
from t2i_align.testbed.oracle import Oracle
from t2i_align.testbed.prompts import draw_statement, split_of
from t2i_align.testbed.scenes import Object, Scene
from t2i_align.testbed.world import IMAGES
from tools.testbed.clip import (
    PatchHeads,
    build_clip,
    contrastive_loss,
    main,
    to_input,
)
from tools.testbed.text import WordEncoder, build_tokenizer


def test_the_text_tower_begins_as_the_bundled_encoder() -> None:
    model = build_clip()
    text = CLIPTextModel.from_pretrained(base_path("sd"), subfolder="text_encoder", dtype=torch.float32).eval()
    ids = WordEncoder(build_tokenizer())(["a red circle above a blue square", "three green crosses"])
    with torch.no_grad():
        ours = model.eval().text_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(ours, text(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_statements_are_of_the_train_split_and_wrong_images_are_wrong() -> None:
    rng = np.random.default_rng(0)
    oracle = Oracle()
    for _ in range(20):
        statement = draw_statement(IMAGES, rng)
        assert split_of(statement) == "train"
        caption = write(statement, rng)
        assert split_of(parse(caption)) == "train"
        images = [draw_image(stated, rng) for stated in (statement, draw_wrong(statement, rng))]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        right, wrong = oracle.judge(pixels, [caption] * 2).strict
        assert right == 1 and wrong == 0


def test_patch_targets_name_what_is_drawn_there() -> None:
    objects = (Object("cross", "blue", "large", 12.0, 12.0, 10.0), Object("circle", "red", "small", 50.0, 44.0, 6.0))
    colours, shapes, sizes = PatchHeads.targets(Scene("pair", "white", objects))
    assert colours.shape == (8, 8) and set(colours.flatten()) == {0, 1, 6} and set(shapes.flatten()) == {0, 1, 5}
    assert (colours[1, 1], shapes[1, 1], sizes[1, 1]) == (6, 5, 2)  # the patch from (8, 8) to (16, 16)
    assert (colours[5, 6], shapes[5, 6], sizes[5, 6]) == (1, 1, 1) and colours[7, 7] == 0


def test_loss_of_an_uninformative_model() -> None:
    """With equal features: half of log 2B over captions' images and log B over images' captions."""
    model = build_clip().eval()
    with torch.no_grad():
        model.visual_projection.weight.zero_()
    rng = np.random.default_rng(0)
    pixels = to_input([draw_image(draw_statement(IMAGES, rng), rng) for _ in range(8)])
    ids = WordEncoder(build_tokenizer())(["a red circle"] * 4)
    assert contrastive_loss(model, pixels, ids).item() == pytest.approx((math.log(8) + math.log(4)) / 2, abs=1e-5)


def test_the_command_leaves_a_scorer(tmp_path: Path) -> None:
    arguments = ["--look", "2", "--steps", "2", "--batch", "4", "--threads", "1"]
    main(["--out", str(tmp_path / "one"), *arguments])
    main(["--out", str(tmp_path / "two"), *arguments])
    pixels = torch.rand(2, 3, 64, 64)
    scores = [
        reward_scorers.build(f"hf-clip:{tmp_path / name}").score(pixels, ["a red circle", "a blue square"])
        for name in ("one", "two")
    ]
    assert torch.equal(*scores) and scores[0].std() > 0
    with pytest.raises(SystemExit, match="exists; pass --force"):
        main(["--out", str(tmp_path / "one"), *arguments])
