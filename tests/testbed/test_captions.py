"""Captions of scenes and clips: written, read back, corrupted, and split into train, dev and test."""

import dataclasses

import numpy as np
import pytest

from t2i_align.testbed import captions, clips, prompts
from t2i_align.testbed.captions import CaptionError, Phrase, Statement, parse
from t2i_align.testbed.world import CLIPS, IMAGES, LONG, PROMPTS, SPLITS, make_prompts, split_of
from tools.testbed import faults

WORLDS = pytest.mark.parametrize("world", [IMAGES, CLIPS, LONG], ids=["images", "clips", "long"])
CORRUPT = {IMAGES: captions.corrupt, CLIPS: faults.corrupt}


def statements(world, number, seed):
    rng = np.random.default_rng(seed)
    return [world.language.describe(world.sample(rng), rng) for _ in range(number)], rng


@WORLDS
def test_captions_round_trip(world):
    stated, rng = statements(world, 1000, 2)
    for statement in stated:
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
        (clips, "a photo of a cat"),
        (clips, "a red circle"),
        (clips, "a red circle standing quickly still"),
        (clips, "two red circles moving to the left"),
        (clips, "on a white background, a red circle moving to the left on a black background"),
    ],
)
def test_foreign_captions_are_quoted_in_the_error(language, caption):
    with pytest.raises(CaptionError) as error:
        language.parse(caption)
    assert caption in str(error.value)


def attributes(statement):
    """Of what moves in a clip, and its background."""
    part = statement.parts[0]
    background = {"background": statement.background}
    return {**dataclasses.asdict(part.phrase), "path": part.path, "speed": part.speed, **background}


@pytest.mark.parametrize(
    ("world", "fault"), [*((IMAGES, f) for f in captions.FAULTS), *((CLIPS, f) for f in faults.CAPTION_FAULTS)]
)
def test_a_corrupted_statement_differs_and_can_be_written(world, fault):
    stated, rng = statements(world, 200, 5)
    wrong = [(s, bad) for s in stated if (bad := CORRUPT[world](s, fault, rng)) is not None]
    for statement, bad in wrong:
        assert bad.canonical() != statement.canonical()
        assert world.language.parse(world.language.write(bad, rng)).canonical() == bad.canonical()
        if world is CLIPS:
            before, after = attributes(statement), attributes(bad)
            assert [name for name in before if before[name] != after[name]] == [fault]
    assert len(wrong) > 30


@pytest.mark.parametrize("world", CORRUPT, ids=["images", "clips"])
def test_unknown_faults_are_errors(world):
    (statement,), rng = statements(world, 1, 0)
    with pytest.raises(ValueError, match="unknown fault 'weather'; the choices are"):
        CORRUPT[world](statement, "weather", rng)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_belong_to_their_split_and_no_statement_occurs_twice(name):
    world, split = PROMPTS[name]
    meanings = {world.language.parse(text).canonical() for text in prompts(name)}
    assert len(meanings) == len(prompts(name)) == world.sizes[SPLITS.index(split)]
    assert {split_of(statement) for statement in meanings} == {split}
    assert prompts(name)[:20] == make_prompts(world, split, 20)
