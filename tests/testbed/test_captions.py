"""Captions of scenes and clips: written, read back, corrupted, and split into train, dev and test."""

import numpy as np
import pytest

from t2i_align.testbed import captions, clip_captions, prompts
from t2i_align.testbed.captions import CaptionError, Phrase, Statement, describe, parse, write
from t2i_align.testbed.clips import sample_clip
from t2i_align.testbed.prompts import SPLITS, make_prompts, split_of
from t2i_align.testbed.scenes import sample_scene
from t2i_align.testbed.world import CLIPS, IMAGES
from tools.testbed import faults

WORLDS = pytest.mark.parametrize("world", [IMAGES, CLIPS], ids=["images", "clips"])


@WORLDS
def test_captions_round_trip(world):
    """1,000 random statements in random phrasings are read back as they were meant."""
    rng = np.random.default_rng(2)
    for _ in range(1000):
        statement = world.language.describe(world.sample(rng), rng)
        caption = world.language.write(statement, rng)
        assert world.language.parse(caption).canonical() == statement.canonical(), caption


@pytest.mark.parametrize(
    ("caption", "statement"),
    [
        ("an orange circle", Statement((Phrase("circle", "orange"),))),
        (
            "above a red square there is a large pink cross on a gray background",
            Statement((Phrase("cross", "pink", "large"), Phrase("square", "red")), "above", "gray"),
        ),
        (
            "on a white background, on the right a blue square, on the left a small red circle",
            Statement((Phrase("square", "blue"), Phrase("circle", "red", "small")), "right", "white"),
        ),
        ("there are three small cyan crosses", Statement((Phrase("cross", "cyan", "small", 3),))),
    ],
)
def test_parse_by_hand(caption, statement):
    assert parse(caption) == statement


@pytest.mark.parametrize(
    ("language", "caption"),
    [
        (captions, ""),
        (captions, "a photo of a cat"),
        (captions, "a red circles"),
        (captions, "an red circle"),
        (captions, "on the left a red circle, on the left a blue square"),
        (captions, "a red circle on a white background on a black background"),
        (clip_captions, "a photo of a cat"),
        (clip_captions, "a red circle"),
        (clip_captions, "a red circle standing quickly still"),
        (clip_captions, "two red circles moving to the left"),
        (clip_captions, "on a white background, a red circle moving to the left on a black background"),
    ],
)
def test_foreign_captions_are_quoted_in_the_error(language, caption):
    with pytest.raises(CaptionError) as error:
        language.parse(caption)
    assert caption in str(error.value)


@pytest.mark.parametrize("fault", captions.FAULTS)
def test_corruption_changes_the_meaning(fault):
    rng = np.random.default_rng(5)
    statements = [describe(sample_scene(rng), rng) for _ in range(200)]
    wrong = [(s, bad) for s in statements if (bad := captions.corrupt(s, fault, rng)) is not None]
    for statement, bad in wrong:
        assert bad.canonical() != statement.canonical()
        assert parse(write(bad, rng)).canonical() == bad.canonical()
    assert len(wrong) > 30


@pytest.mark.parametrize("fault", faults.CAPTION_FAULTS)
def test_a_corrupted_caption_of_a_clip_differs_in_one_thing(fault):
    rng = np.random.default_rng(3)
    statements = [clip_captions.describe(sample_clip(rng), rng) for _ in range(40)]
    wrong = [(s, bad) for s in statements if (bad := faults.corrupt(s, fault, rng)) is not None]
    for statement, bad in wrong:
        (a, *_), (b, *_) = statement.parts, bad.parts
        changed = {
            "path": a.path != b.path,
            "speed": a.speed != b.speed,
            "background": statement.background != bad.background,
            **{name: getattr(a.phrase, name) != getattr(b.phrase, name) for name in ("size", "colour", "shape")},
        }
        assert [name for name, differs in changed.items() if differs] == [fault]
    assert len(wrong) > 10


@pytest.mark.parametrize("corrupt", [captions.corrupt, faults.corrupt])
def test_unknown_faults_are_errors(corrupt):
    rng = np.random.default_rng(0)
    world = IMAGES if corrupt is captions.corrupt else CLIPS
    with pytest.raises(ValueError, match="unknown fault 'weather'; the choices are"):
        corrupt(world.language.describe(world.sample(rng), rng), "weather", rng)


@pytest.mark.parametrize(("world", "prefix"), [(IMAGES, ""), (CLIPS, "video-")])
def test_splits_are_disjoint_in_meaning(world, prefix):
    meanings = {split: {world.language.parse(text).canonical() for text in prompts(prefix + split)} for split in SPLITS}
    for split, number in world.sizes.items():
        assert len(meanings[split]) == number == len(prompts(prefix + split))
        assert all(split_of(statement) == split for statement in meanings[split])
        assert prompts(prefix + split)[:20] == make_prompts(world, split, 20)
